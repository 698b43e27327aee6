#include "batch.cuh"
// Batch norm in one cooperative launch each way: a group of `parts` blocks takes one tile of channels after the other, and
// so few tiles are under way at once that the second look at them finds them in the L2 cache. `tickets` holds a number for
// each group and one more; `partial` 3 (backward 2) numbers for each part and channel.

// Ends a launch with tickets that are zero again.
KT_DEVICE void leave(unsigned* tickets, int groups) {
  if (!kt_last_block(tickets + groups, gridDim.x)) return;
  for (int i = threadIdx.x; i < groups; i += blockDim.x) tickets[i] = 0;
}

// x is read twice, once of it from memory, and y written once.
KT_KERNEL(KT_THREADS, 2 - KT_COLUMNS) bn_train_resident(const KT_T* x, const kt_real* weights, int channels,
    long long inner, long long positions, long long per, int parts, int lanes, int tiles, double* partial,
    unsigned* tickets, double* count, double* mean, double* m2, Scalars<3> h, kt_real* hi, kt_real* lo, kt_real* rstd,
    kt_real* running_mean, kt_real* running_var, const kt_real* gamma, const kt_real* beta, const KT_T* residual,
    kt_real floor, int large, KT_T* y) {
  const Split split{channels, inner, positions, per, parts, lanes};
  const int groups = gridDim.x / parts, group = blockIdx.x / parts;
  for (int tile = group, round = 1; tile < tiles; tile += groups, ++round) {
    const Block own(split, tile, blockIdx.x % parts);
    const bool first = own.j == 0 && own.k < own.channels;
    const int c = own.first + own.k;
    Moments<double> m = weights ? part_moments<true>(split, own, x, weights, One{x})
                                : part_moments<false>(split, own, x, weights, One{x});
    if (first) put_part(partial, own.part, channels, c, m);
    kt_group_sync(tickets + group, parts, round);
    m = merge_parts(own, parts, [&](int s) { return get_part(partial, s, channels, c); });
    const Normal normal(m, h[0]);
    if (first && own.part == 0) {
      put_moments(c, m, count, mean, m2);
      put_statistics(c, m, normal, h, hi, lo, rstd, running_mean, running_var);
    }
    const kt_real found[3] = {normal.hi, normal.lo, normal.rstd};
    const kt_real* all = for_all(own, found);
    const Affine affine(split, own, all, all + 1, all + 2, 3, gamma, beta);
    write_normalised(split, own, affine, One{x}, residual, floor, large, y);
  }
  leave(tickets, groups);
}

// The positions that a thread reads at once: many columns leave registers for no more than one.
#if KT_COLUMNS && (KT_V == 8 || __CUDA_ARCH__ >= 1200)
const int KT_PAIRS = 1;
#else
const int KT_PAIRS = KT_U2;
#endif

// dy, x and a residual are read twice, once of it from memory; dx and dresidual are written once.
KT_KERNEL(KT_THREADS, 2 - KT_COLUMNS) bn_backward_resident(const KT_T* dy, const KT_T* x, const kt_real* weights,
    int channels, long long inner, long long positions, long long per, int parts, int lanes, int tiles,
    double* partial, unsigned* tickets, const double* count, const kt_real* hi, const kt_real* lo, const kt_real* rstd,
    const kt_real* gamma, const kt_real* beta, const KT_T* residual, kt_real limit, double* sum_dy,
    double* sum_dy_xhat, int large, KT_T* dx, KT_T* dresidual) {
  const Split split{channels, inner, positions, per, parts, lanes};
  const int groups = gridDim.x / parts, group = blockIdx.x / parts;
  const double inverse = 1.0 / count[0];
  for (int tile = group, round = 1; tile < tiles; tile += groups, ++round) {
    const Block own(split, tile, blockIdx.x % parts);
    const bool has = own.k < own.channels;
    const int c = has ? own.first + own.k : own.first;
    double sums[2];
    part_sums<KT_PAIRS>(split, own, Affine(split, own, hi, lo, rstd, gamma, beta), Two{dy, x}, residual, limit, sums);
    if (own.j == 0 && has) put_sums(partial, own.part, channels, c, sums);
    kt_group_sync(tickets + group, parts, round);
    merge_sums(own, parts, partial, channels, c, sums);
    if (own.j == 0 && has && own.part == 0) {
      sum_dy[c] = sums[0];
      sum_dy_xhat[c] = sums[1];
    }
    const Affine affine(split, own, hi, lo, rstd, gamma, beta);  // once more, rather than in registers meanwhile
    write_with<KT_PAIRS>(split, own, affine, mean_of(sums[0], inverse), slope_of(sums[1], inverse, rstd[c]),
                         Two{dy, x}, weights, residual, limit, large, dx, dresidual);
  }
  leave(tickets, groups);
}
