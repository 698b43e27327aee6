#include "groups.cuh"
// Group norm (Wu, He 2018, arXiv:1803.08494) with channels last, in parts that are read twice. Instance norm (Ulyanov,
// Vedaldi, Lempitsky 2016, arXiv:1607.08022) has one group per channel.

const int ROWS = 8;  // positions that a thread holds

// The moments of each part of each group, `partial` of shape (samples * groups, parts * pieces, 3). Reads x; a block has
// step * ROWS positions.
KT_KERNEL(256) moments_last(const KT_T* x, double* partial, int positions, int rows, int channels, int width, int tile,
                            int pieces) {
  KT_SHARED(kt_real, stage, 2 * 256 * KT_V);
  KT_SHARED(double, sums, 2 * 256);
  const Tile own(positions, rows, channels, width, tile, pieces);
  const int wide = pieces > 1 ? own.channels : width, groups = own.channels / wide;
  const double values = (double)min(rows, positions - own.part * rows) * wide;
  const Count count = {values, 1.0 / values};

  Data kept[ROWS];
  kt_real total[1][KT_V] = {}, about[KT_V], terms[2][KT_V] = {};
#pragma unroll
  for (int k = 0; k < ROWS; ++k) {
    const int p = own.row + k * own.step;
    if (p < own.stop) kept[k] = load<KT_V>(x + own.start + (long long)p * channels);
  }
#pragma unroll
  for (int k = 0; k < ROWS; ++k) {
    if (own.row + k * own.step >= own.stop) continue;
#pragma unroll
    for (int v = 0; v < KT_V; ++v) total[0][v] += widen(kept[k].v[v]);
  }
  group_sums(own, wide, total, stage, sums);
#pragma unroll
  for (int v = 0; v < KT_V && own.stop; ++v) about[v] = nearby(sums[(own.lane * KT_V + v) / wide], count);
#pragma unroll
  for (int k = 0; k < ROWS; ++k) {
    if (own.row + k * own.step >= own.stop) continue;
#pragma unroll
    for (int v = 0; v < KT_V; ++v) {
      const kt_real d = widen(kept[k].v[v]) - about[v];
      terms[0][v] += d;
      terms[1][v] += d * d;
    }
  }
  const int group = threadIdx.x;
  const double of_group = group < groups ? sums[group] : 0.0;
  group_sums(own, wide, terms, stage, sums);
  if (group >= groups) return;
  const Moments<double> found =
      moments_about(nearby(of_group, count), count, of_group, sums[2 * group], sums[2 * group + 1]);
  const long long row = own.sample * (channels / width) + own.group + group;
  double* const to = partial + 3 * ((row * own.parts + own.part) * pieces + own.piece);
  to[0] = found.count;
  to[1] = found.mean;
  to[2] = found.m2;
}

// y from hi, lo and rstd of each group, and gamma and beta of each channel. Reads x, writes y.
KT_KERNEL(256) apply_last(const KT_T* x, const kt_real* gamma, const kt_real* beta, const kt_real* hi,
                          const kt_real* lo, const kt_real* rstd, KT_T* y, int positions, int rows, int channels,
                          int width, int tile) {
  const Tile own(positions, rows, channels, 1, tile, 1);
  if (!own.stop) return;
  const int channel = own.first + own.lane * KT_V;
  const long long first = own.sample * (channels / width);
  Wide high, low, scale, shift;
  each_group(channel, width, [&](int v, int group) {
    high.v[v] = hi[first + group];
    low.v[v] = lo[first + group];
    scale.v[v] = rstd[first + group] * (gamma ? gamma[channel + v] : kt_real(1));
    shift.v[v] = beta ? beta[channel + v] : kt_real(0);
  });
#pragma unroll 4
  for (int p = own.row; p < own.stop; p += own.step) {
    const long long at = own.start + (long long)p * channels;
    const Wide value = load_wide<KT_V>(x + at);
    Wide out;
#pragma unroll
    for (int v = 0; v < KT_V; ++v) out.v[v] = centred(value.v[v], high.v[v], low.v[v]) * scale.v[v] + shift.v[v];
    stream<KT_V>(y + at, narrow_all<KT_T>(out));
  }
}

// The sums of dy and dy * (x - mean) of each channel over parts of the positions, `partial` of shape (samples, parts, 2,
// channels). Reads dy and x.
KT_KERNEL(256, 2) sums_last(const KT_T* dy, const KT_T* x, const double* mean, double* partial, int positions, int rows,
                            int channels, int width, int tile) {
  KT_SHARED(kt_real, stage, 2 * 256 * KT_V);
  const Tile own(positions, rows, channels, 1, tile, 1);
  const long long first = own.sample * (channels / width);
  Wide high, low;
  kt_real terms[2][KT_V] = {};
  if (own.stop) {
    each_group(own.first + own.lane * KT_V, width, [&](int v, int group) {
      high.v[v] = (kt_real)mean[first + group];
      low.v[v] = (kt_real)(mean[first + group] - (double)high.v[v]);
    });
  }
#pragma unroll 4
  for (int p = own.row; p < own.stop; p += own.step) {
    const long long at = own.start + (long long)p * channels;
    const Wide up = load_wide<KT_V>(dy + at), value = load_wide<KT_V>(x + at);
#pragma unroll
    for (int v = 0; v < KT_V; ++v) {
      terms[0][v] += up.v[v];
      terms[1][v] += up.v[v] * centred(value.v[v], high.v[v], low.v[v]);
    }
  }
  if (own.row < own.step) own.lay(terms, stage);
  __syncthreads();
  own.add_rows(stage, partial + (own.sample * own.parts + own.part) * 2 * channels + own.first, channels);
}

// dx from the mean, and from `means`, for each group the mean of dy * gamma, the slope and rstd. Reads dy and x, writes dx.
KT_KERNEL(256) gradient_last(const KT_T* dy, const KT_T* x, const kt_real* gamma, const double* mean,
                             const kt_real* means, KT_T* dx, int positions, int rows, int channels, int width,
                             int tile) {
  const Tile own(positions, rows, channels, 1, tile, 1);
  if (!own.stop) return;
  const int channel = own.first + own.lane * KT_V;
  const long long first = own.sample * (channels / width);
  Wide high, low, weight, mean_g, slope, rstd;
  each_group(channel, width, [&](int v, int group) {
    high.v[v] = (kt_real)mean[first + group];
    low.v[v] = (kt_real)(mean[first + group] - (double)high.v[v]);
    weight.v[v] = gamma ? gamma[channel + v] : kt_real(1);
    mean_g.v[v] = means[3 * (first + group)];
    slope.v[v] = means[3 * (first + group) + 1];
    rstd.v[v] = means[3 * (first + group) + 2];
  });
#pragma unroll 2
  for (int p = own.row; p < own.stop; p += own.step) {
    const long long at = own.start + (long long)p * channels;
    const Wide up = load_wide<KT_V>(dy + at), value = load_wide<KT_V>(x + at);
    Wide out;
#pragma unroll
    for (int v = 0; v < KT_V; ++v) {
      const kt_real d = centred(value.v[v], high.v[v], low.v[v]);
      out.v[v] = gradient(up.v[v] * weight.v[v], d, rstd.v[v], mean_g.v[v], slope.v[v]);
    }
    stream<KT_V>(dx + at, narrow_all<KT_T>(out));
  }
}
