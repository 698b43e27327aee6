#include "rows.cuh"
// Group norm (Wu, He 2018, arXiv:1803.08494): the backward with channels first, and all with channels last. Instance norm
// (Ulyanov, Vedaldi, Lempitsky 2016, arXiv:1607.08022) has one group per channel.

// --------------------------------------------------------------------------- channels first

// dx, and the sums of dy and dy * x̂ over the places of each channel, `totals` of shape (samples, 2, channels). A block has
// the `width` planes of a group of a sample, blockDim.y at once, and keeps both arrays in shared memory: dy and x are
// read once, 2 * width * plane * sizeof(KT_T) bytes.
KT_KERNEL(512) backward_shared(const KT_T* dy, const KT_T* x, const kt_real* gamma, const double* mean,
                               const double* m2, kt_real* totals, KT_T* dx, int plane, int width, double inverse,
                               int groups, Scalars<1> h) {
  KT_SHARED(double, scratch, 128);
  KT_SHARED(double, side, 128);  // of the planes side by side
  KT_DYN_SHARED(KT_T, space);
  const long long row = blockIdx.x, sample = row / groups;
  const int n = plane / KT_V, first = (int)(row - sample * groups) * width, channels = groups * width;
  const Shared ups(space), xs(space + (long long)width * plane);
  const Saved s = saved(Count{1.0 / inverse, inverse}, mean[row], m2[row], h[0]);

  double of_group[2] = {0.0, 0.0};
  double* turn = scratch;
  for (int from = 0; from < width; from += blockDim.y, turn = scratch + (turn == scratch) * 64) {
    const int c = from + threadIdx.y, stop = c < width ? n : 0;
    const long long at = (row * width + c) * plane;
    kt_real terms[2] = {0, 0};
#pragma unroll 4
    for (int i = threadIdx.x; i < stop; i += blockDim.x) {
      const Data up = load<KT_V>(dy + at + i * KT_V), value = load<KT_V>(x + at + i * KT_V);
      ups.put(c * n + i, up);
      xs.put(c * n + i, value);
#pragma unroll
      for (int v = 0; v < KT_V; ++v) {
        terms[0] += widen(up.v[v]);
        terms[1] += widen(up.v[v]) * centred(widen(value.v[v]), s.hi, s.lo);
      }
    }
    double sums[2];
    row_sums(terms, turn, sums);
    if (c >= width) continue;
    sums[1] *= s.rstd;
    const double weight = gamma ? (double)gamma[first + c] : 1.0;
    of_group[0] += weight * sums[0];
    of_group[1] += weight * sums[1];
    if (threadIdx.x == 0) {
      totals[2 * sample * channels + first + c] = (kt_real)sums[0];
      totals[(2 * sample + 1) * channels + first + c] = (kt_real)sums[1];
    }
  }
  if (threadIdx.x == 0) {
    side[2 * threadIdx.y] = of_group[0];
    side[2 * threadIdx.y + 1] = of_group[1];
  }
  __syncthreads();
  of_group[0] = of_group[1] = 0.0;
  for (int y = 0; y < (int)blockDim.y; ++y) {
    of_group[0] += side[2 * y];
    of_group[1] += side[2 * y + 1];
  }
  const kt_real mean_g = (kt_real)(of_group[0] * inverse), slope = (kt_real)(of_group[1] * inverse * s.rstd);
  for (int c = threadIdx.y; c < width; c += blockDim.y) {
    const kt_real weight = gamma ? gamma[first + c] : kt_real(1);
#pragma unroll 2
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const Data up = ups.get(c * n + i), value = xs.get(c * n + i);
      Wide out;
#pragma unroll
      for (int v = 0; v < KT_V; ++v) {
        out.v[v] = gradient(widen(up.v[v]) * weight, centred(widen(value.v[v]), s.hi, s.lo), s.rstd, mean_g, slope);
      }
      store<KT_V>(dx + (row * width + c) * plane + i * KT_V, narrow_all<KT_T>(out));
    }
  }
}

// --------------------------------------------------------------------------- channels last

const int ROWS = 8;  // positions that a thread keeps

// What a block has of samples of `positions` rows of `channels`: `rows` of them, and of those a tile of channels, which are
// groups of `width` channels, or one of the `pieces` of a group. Threads have one vector of a row, in turns of `step` rows.
struct Tile {
  long long sample, start;  // where the first of its elements that are this thread's lies
  int part, parts;          // of the sample's positions
  int group, piece;         // the first group; the piece of it
  int first, channels;      // of the tile
  int lane, span, row, step, stop;

  KT_DEVICE Tile(int positions, int rows, int all, int width, int tile, int pieces) {
    const int tiles = pieces > 1 ? all / width * pieces : (all + tile - 1) / tile;
    parts = (positions + rows - 1) / rows;
    const long long block = blockIdx.x / tiles;
    const int number = blockIdx.x - (int)(block * tiles);
    sample = block / parts;
    part = (int)(block - sample * parts);
    group = pieces > 1 ? number / pieces : number * (tile / width);
    piece = pieces > 1 ? number % pieces : 0;
    first = group * width + piece * tile;
    channels = min(tile, (pieces > 1 ? (group + 1) * width : all) - first);
    span = tile / KT_V;
    lane = threadIdx.x % span;
    row = threadIdx.x / span;
    step = blockDim.x / span;
    stop = row < step && lane * KT_V < channels ? min(rows, positions - part * rows) : 0;
    start = (sample * positions + (long long)part * rows) * all + first + lane * KT_V;
  }

  // The places of this thread's vector, among those that all threads put into `stage`, of shape (step, N, tile).
  KT_DEVICE int place(int N, int n) const { return (row * N + n) * span * KT_V + lane * KT_V; }
};

// The sums of N numbers that the block's threads have for each place of their vectors, over all rows and the `width`
// channels of each group of the tile: `sums` of shape (groups, N), for all threads.
template <int N>
KT_DEVICE void group_sums(const Tile& own, int width, const kt_real (&x)[N][KT_V], kt_real* stage, double* sums) {
  __syncthreads();
  if (own.row < own.step) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int v = 0; v < KT_V; ++v) stage[own.place(N, n) + v] = x[n][v];
    }
  }
  __syncthreads();
  const int groups = own.channels / width, row = own.span * KT_V;
  int team = 32;
  while (team * groups > blockDim.x) team /= 2;
  const int group = threadIdx.x / team, j = threadIdx.x % team;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    double sum = 0.0;
    for (int i = j; i < width * own.step && group < groups; i += team) {
      sum += stage[(i / width * N + n) * row + group * width + i % width];
    }
    for (int offset = team / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(KT_WARP, sum, offset);
    if (group < groups && j == 0) sums[group * N + n] = sum;
  }
  __syncthreads();
}

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
  for (int v = 0; v < KT_V; ++v) about[v] = own.stop ? nearby(sums[(own.lane * KT_V + v) / wide], count) : kt_real(0);
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

// What the channels of a thread's vector have in common with others of their groups: N numbers each.
template <typename F> KT_DEVICE void each_group(int channel, int width, const F& use) {
  int group = channel / width, room = (group + 1) * width - channel;
#pragma unroll
  for (int v = 0; v < KT_V; ++v) {
    use(v, group);
    if (--room == 0) {
      room = width;
      ++group;
    }
  }
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
KT_KERNEL(256) sums_last(const KT_T* dy, const KT_T* x, const double* mean, double* partial, int positions, int rows,
                         int channels, int width, int tile) {
  KT_SHARED(kt_real, stage, 2 * 256 * KT_V);
  const Tile own(positions, rows, channels, 1, tile, 1);
  const long long first = own.sample * (channels / width);
  Wide high, low, terms[2] = {};
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
      terms[0].v[v] += up.v[v];
      terms[1].v[v] += up.v[v] * centred(value.v[v], high.v[v], low.v[v]);
    }
  }
  if (own.row < own.step) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int v = 0; v < KT_V; ++v) stage[own.place(2, n) + v] = terms[n].v[v];
    }
  }
  __syncthreads();
  double* const to = partial + (own.sample * own.parts + own.part) * 2 * channels + own.first;
  for (int j = threadIdx.x; j < 2 * own.channels; j += blockDim.x) {
    const int n = j >= own.channels, c = j - n * own.channels;
    double sum = 0.0;
    for (int r = 0; r < own.step; ++r) sum += stage[(2 * r + n) * own.span * KT_V + c];
    to[n * channels + c] = sum;
  }
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
