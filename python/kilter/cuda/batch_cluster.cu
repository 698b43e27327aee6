#include "batch.cuh"
// Batch norm in one launch each way, for sm_90 and later: a cluster of KT_K blocks holds the values of a tile of channels
// in shared memory, so that they are read from memory once. Sums meet in the shared memory of the cluster's blocks.

typedef Packed<KT_T, KT_V>::word kt_word;  // KT_V elements are one word of 16 bytes

// A thread's vectors in shared memory: words beside those of the other threads, one row for each position.
struct Place {
  kt_word* words;
  KT_DEVICE kt_word& operator[](int turn) const { return words[turn * (int)blockDim.x + threadIdx.x]; }
};

// Reads the vectors of an array and keeps them.
struct Keep {
  const KT_T* x;
  Place place;
  template <typename Look, int U> KT_DEVICE void operator()(const Look& look, Vec<KT_T, KT_V> (&to)[U]) const {
    look.read(x, to);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      Packed<KT_T, KT_V> packed;
      packed.vec = to[u];
      if (look.has(u)) place[look.turn + u] = packed.w[0];
    }
  }
};

// Finds them again.
struct Kept {
  Place place;
  template <typename Look, int U> KT_DEVICE void operator()(const Look& look, Vec<KT_T, KT_V> (&to)[U]) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      Packed<KT_T, KT_V> packed;
      packed.w[0] = place[look.has(u) ? look.turn + u : look.turn];
      to[u] = packed.vec;
    }
  }
};

// The same for the pair of dy and x.
template <typename Read> struct Both {
  Read dy, x;
  template <typename Look, int U>
  KT_DEVICE void operator()(const Look& look, Vec<KT_T, KT_V> (&to)[U], Vec<KT_T, KT_V> (&to_x)[U]) const {
    dy(look, to);
    x(look, to_x);
  }
};

// x is read once and y written once. `turns` are the most positions of a thread.
KT_KERNEL(KT_THREADS, 1) KT_CLUSTER(KT_K) bn_train_cluster(const KT_T* x, const kt_real* weights, int channels,
    long long inner, long long positions, long long per, int parts, int lanes, double* count, double* mean, double* m2,
    Scalars<3> h, kt_real* hi, kt_real* lo, kt_real* rstd, kt_real* running_mean, kt_real* running_var,
    const kt_real* gamma, const kt_real* beta, const KT_T* residual, kt_real floor, int large, KT_T* y) {
  KT_DYN_SHARED(kt_word, held);
  KT_SHARED(double, brought, KT_MOST_CHANNELS * 3);
  const Split split{channels, inner, positions, per, parts, lanes};
  const Block own(split, blockIdx.x / KT_K, kt_cluster_rank());
  const bool first = own.j == 0 && own.k < own.channels;
  const Keep keep{x, Place{held}};
  Moments<double> m = weights ? part_moments<true>(split, own, x, weights, keep)
                              : part_moments<false>(split, own, x, weights, keep);
  if (first) {
    brought[own.k * 3] = m.count;
    brought[own.k * 3 + 1] = m.mean;
    brought[own.k * 3 + 2] = m.m2;
  }
  kt_cluster_sync();
  m = merge_parts(own, KT_K, [&](int s) {
    const double* p = brought + own.k * 3;
    return Moments<double>{kt_peer(p, s), kt_peer(p + 1, s), kt_peer(p + 2, s)};
  });
  kt_cluster_sync();  // none may leave or write before all have read
  const Normal normal(m, h[0]);
  if (first && own.part == 0) {
    const int c = own.first + own.k;
    put_moments(c, m, count, mean, m2);
    put_statistics(c, m, normal, h, hi, lo, rstd, running_mean, running_var);
  }
  const kt_real found[3] = {normal.hi, normal.lo, normal.rstd};
  const kt_real* all = for_all(own, found);
  const Affine affine(split, own, all, all + 1, all + 2, 3, gamma, beta);
  write_normalised(split, own, affine, Kept{Place{held}}, residual, floor, large, y);
}

// dy and x are read once, a residual twice, dx and dresidual written once.
KT_KERNEL(KT_THREADS, 1) KT_CLUSTER(KT_K) bn_backward_cluster(const KT_T* dy, const KT_T* x, const kt_real* weights,
    int channels, long long inner, long long positions, long long per, int parts, int lanes, int turns,
    const double* count, const kt_real* hi, const kt_real* lo, const kt_real* rstd, const kt_real* gamma,
    const kt_real* beta, const KT_T* residual, kt_real limit, double* sum_dy, double* sum_dy_xhat, int large, KT_T* dx,
    KT_T* dresidual) {
  KT_DYN_SHARED(kt_word, held);
  KT_SHARED(double, brought, KT_MOST_CHANNELS * 2);
  const Split split{channels, inner, positions, per, parts, lanes};
  const Block own(split, blockIdx.x / KT_K, kt_cluster_rank());
  const bool has = own.k < own.channels;
  const Place place_dy{held}, place_x{held + turns * (int)blockDim.x};
  double sums[2];
  part_sums(split, own, Affine(split, own, hi, lo, rstd, gamma, beta), Both<Keep>{{dy, place_dy}, {x, place_x}},
            residual, limit, sums);
  if (own.j == 0 && has) {
    brought[own.k * 2] = sums[0];
    brought[own.k * 2 + 1] = sums[1];
  }
  kt_cluster_sync();
  sums[0] = sums[1] = 0.0;
  for (int s = 0; has && s < KT_K; ++s) {
    sums[0] += kt_peer(brought + own.k * 2, s);
    sums[1] += kt_peer(brought + own.k * 2 + 1, s);
  }
  kt_cluster_sync();
  const int c = has ? own.first + own.k : own.first;
  if (own.j == 0 && has && own.part == 0) {
    sum_dy[c] = sums[0];
    sum_dy_xhat[c] = sums[1];
  }
  const double inverse = 1.0 / count[0];
  const Affine affine(split, own, hi, lo, rstd, gamma, beta);  // once more, rather than in registers meanwhile
  write_with(split, own, affine, mean_of(sums[0], inverse), slope_of(sums[1], inverse, rstd[c]),
             Both<Kept>{{place_dy}, {place_x}}, weights, residual, limit, large, dx, dresidual);
}
