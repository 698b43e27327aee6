#include "batch.cuh"
// Batch norm in two launches each way: sums, which the last block of each tile of channels puts together, and what
// follows from them. Every byte is read twice and written once.

// The moments of every channel; where `hi` is given, also what they are normalised by. `partial` holds 3 numbers for each
// part and channel, `tickets` one for each tile.
KT_KERNEL(KT_THREADS, KT_RESIDENT) bn_stats(const KT_T* x, const kt_real* weights, int channels, long long inner,
    long long positions, long long per, int parts, int lanes, double* partial, unsigned* tickets, double* count,
    double* mean, double* m2, Scalars<3> h, kt_real* hi, kt_real* lo, kt_real* rstd, kt_real* running_mean,
    kt_real* running_var) {
  const Split split{channels, inner, positions, per, parts, lanes};
  const int tiles = gridDim.x / parts;
  const Block own(split, blockIdx.x % tiles, blockIdx.x / tiles);
  const bool first = own.j == 0 && own.k < own.channels;
  const int c = own.first + own.k;
  Moments<double> m = weights ? part_moments<true>(split, own, x, weights, One{x})
                              : part_moments<false>(split, own, x, weights, One{x});
  if (parts > 1) {
    if (first) put_part(partial, own.part, channels, c, m);
    if (!kt_last_block(tickets + own.tile, parts)) return;
    m = merge_parts(own, parts, [&](int s) { return get_part(partial, s, channels, c); });
  }
  if (!first) return;
  put_moments(c, m, count, mean, m2);
  if (hi) put_statistics(c, m, Normal(m, h[0]), h, hi, lo, rstd, running_mean, running_var);
}

KT_KERNEL(KT_THREADS, KT_RESIDENT) bn_finish(int channels, const double* count, const double* mean, const double* m2,
    Scalars<3> h, kt_real* hi, kt_real* lo, kt_real* rstd, kt_real* running_mean, kt_real* running_var) {
  const long long c = grid_thread();
  if (c >= channels) return;
  const Moments<double> m{count[0], mean[c], m2[c]};
  put_statistics((int)c, m, Normal(m, h[0]), h, hi, lo, rstd, running_mean, running_var);
}

// From the last block to the first: what the sums have read last is read first, and may still be in the cache.
KT_KERNEL(KT_THREADS, KT_RESIDENT) bn_apply(const KT_T* x, int channels, long long inner, long long positions,
    long long per, int parts, int lanes, const kt_real* hi, const kt_real* lo, const kt_real* rstd,
    const kt_real* gamma, const kt_real* beta, const KT_T* residual, kt_real floor, int large, KT_T* y) {
  const Split split{channels, inner, positions, per, parts, lanes};
  const int tiles = gridDim.x / parts, block = gridDim.x - 1 - blockIdx.x;
  const Block own(split, block % tiles, block / tiles);
  const Affine affine(split, own, hi, lo, rstd, gamma, beta);
  write_normalised(split, own, affine, One{x}, residual, floor, large, y);
}

// The sums of dz and of dz * x̂ of every channel. `partial` holds 2 numbers for each part and channel.
KT_KERNEL(KT_THREADS, KT_RESIDENT) bn_sums(const KT_T* dy, const KT_T* x, int channels, long long inner,
    long long positions, long long per, int parts, int lanes, double* partial, unsigned* tickets, const kt_real* hi,
    const kt_real* lo, const kt_real* rstd, const kt_real* gamma, const kt_real* beta, const KT_T* residual,
    kt_real limit, double* sum_dy, double* sum_dy_xhat) {
  const Split split{channels, inner, positions, per, parts, lanes};
  const int tiles = gridDim.x / parts;
  const Block own(split, blockIdx.x % tiles, blockIdx.x / tiles);
  const bool first = own.j == 0 && own.k < own.channels;
  const int c = own.first + own.k;
  const Affine affine(split, own, hi, lo, rstd, gamma, beta);
  double sums[2];
  part_sums(split, own, affine, Two{dy, x}, residual, limit, sums);
  if (parts > 1) {
    if (first) put_sums(partial, own.part, channels, c, sums);
    if (!kt_last_block(tickets + own.tile, parts)) return;
    merge_sums(own, parts, partial, channels, c, sums);
  }
  if (!first) return;
  sum_dy[c] = sums[0];
  sum_dy_xhat[c] = sums[1];
}

KT_KERNEL(KT_THREADS, KT_RESIDENT) bn_gradient(const KT_T* dy, const KT_T* x, const kt_real* weights, int channels,
    long long inner, long long positions, long long per, int parts, int lanes, const double* count, const kt_real* hi,
    const kt_real* lo, const kt_real* rstd, const kt_real* gamma, const kt_real* beta, const KT_T* residual,
    kt_real limit, const double* sum_dy, const double* sum_dy_xhat, int large, KT_T* dx, KT_T* dresidual) {
  const Split split{channels, inner, positions, per, parts, lanes};
  const int tiles = gridDim.x / parts, block = gridDim.x - 1 - blockIdx.x;
  const Block own(split, block % tiles, block / tiles);
  const Affine affine(split, own, hi, lo, rstd, gamma, beta);
  const double inverse = 1.0 / count[0];
  kt_real mean_dy[KT_A], slope[KT_A];
#pragma unroll
  for (int a = 0; a < KT_A; ++a) {
    const int c = own.first + own.channel(split, a);
    mean_dy[a] = mean_of(sum_dy[c], inverse);
    slope[a] = slope_of(sum_dy_xhat[c], inverse, rstd[c]);
  }
  const Two read{dy, x};
  if (weights)
    write_gradient<true>(split, own, affine, mean_dy, slope, read, weights, residual, limit, large, dx, dresidual);
  else
    write_gradient<false>(split, own, affine, mean_dy, slope, read, weights, residual, limit, large, dx, dresidual);
}
