#include "groups.cuh"
// Group norm of groups that a block keeps in shared memory: the backward with channels first, and all with channels last.

// dx, and the sums of dy and dy * x̂ over the places of each channel, `totals` of shape (samples, 2, channels). A block has
// the `width` planes of a group of a sample, blockDim.y at once, and keeps both arrays in shared memory: dy and x are
// read once, 2 * width * plane * sizeof(KT_T) bytes.
KT_KERNEL(512, 1) backward_shared(const KT_T* dy, const KT_T* x, const kt_real* gamma, const double* mean,
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

// What blocks of up to 512 threads and 256 groups put their sums into.
struct Room {
  kt_real* stage;
  double* sums;
  Saved* found;
  kt_real* means;
};

KT_DEVICE Room room() {
  KT_SHARED(kt_real, stage, 2 * 512 * KT_V);
  KT_SHARED(double, sums, 2 * 256);
  KT_SHARED(Saved, found, 256);
  KT_SHARED(kt_real, means, 2 * 256);
  return Room{stage, sums, found, means};
}

// y, mean and m2. A block has a tile of whole groups of a sample, tile * positions * sizeof(KT_T) bytes.
KT_KERNEL(512, 1) forward_last(const KT_T* x, const kt_real* gamma, const kt_real* beta, double* mean, double* m2,
                               KT_T* y, int positions, int channels, int width, int tile, Scalars<1> h) {
  KT_DYN_SHARED(KT_T, space);
  const Room shared = room();
  const Tile own(positions, positions, channels, width, tile, 1);
  const Shared kept(space);
  const int groups = own.channels / width, group = threadIdx.x;
  const Count count = {(double)positions * width, 1.0 / ((double)positions * width)};

  kt_real total[1][KT_V] = {}, about[KT_V], terms[2][KT_V] = {};
#pragma unroll 4
  for (int p = own.row; p < own.stop; p += own.step) {
    const Data value = load<KT_V>(x + own.start + (long long)p * channels);
    kept.put(p * own.span + own.lane, value);
#pragma unroll
    for (int v = 0; v < KT_V; ++v) total[0][v] += widen(value.v[v]);
  }
  group_sums(own, width, total, shared.stage, shared.sums);
#pragma unroll
  for (int v = 0; v < KT_V && own.stop; ++v) about[v] = nearby(shared.sums[(own.lane * KT_V + v) / width], count);
  const double of_group = group < groups ? shared.sums[group] : 0.0;
#pragma unroll 2
  for (int p = own.row; p < own.stop; p += own.step) {
    const Data value = kept.get(p * own.span + own.lane);
#pragma unroll
    for (int v = 0; v < KT_V; ++v) {
      const kt_real d = widen(value.v[v]) - about[v];
      terms[0][v] += d;
      terms[1][v] += d * d;
    }
  }
  group_sums(own, width, terms, shared.stage, shared.sums);
  if (group < groups) {
    const Moments<double> m =
        moments_about(nearby(of_group, count), count, of_group, shared.sums[2 * group], shared.sums[2 * group + 1]);
    shared.found[group] = saved(count, m.mean, m.m2, h[0]);
    const long long row = own.sample * (channels / width) + own.group + group;
    mean[row] = m.mean;
    m2[row] = m.m2;
  }
  __syncthreads();
  if (!own.stop) return;
  const int channel = own.first + own.lane * KT_V;
  Wide high, low, scale, shift;
  each_group(own.lane * KT_V, width, [&](int v, int group) {
    high.v[v] = shared.found[group].hi;
    low.v[v] = shared.found[group].lo;
    scale.v[v] = shared.found[group].rstd * (gamma ? gamma[channel + v] : kt_real(1));
    shift.v[v] = beta ? beta[channel + v] : kt_real(0);
  });
#pragma unroll 2
  for (int p = own.row; p < own.stop; p += own.step) {
    const Data value = kept.get(p * own.span + own.lane);
    Wide out;
#pragma unroll
    for (int v = 0; v < KT_V; ++v)
      out.v[v] = centred(widen(value.v[v]), high.v[v], low.v[v]) * scale.v[v] + shift.v[v];
    store<KT_V>(y + own.start + (long long)p * channels, narrow_all<KT_T>(out));
  }
}

// dx, and `totals` as in backward_shared. A block has a tile of whole groups of a sample of both arrays, 2 * tile *
// positions * sizeof(KT_T) bytes.
KT_KERNEL(512) backward_last(const KT_T* dy, const KT_T* x, const kt_real* gamma, const double* mean, const double* m2,
                             kt_real* totals, KT_T* dx, int positions, int channels, int width, int tile,
                             Scalars<1> h) {
  KT_DYN_SHARED(KT_T, space);
  const Room shared = room();
  const Tile own(positions, positions, channels, width, tile, 1);
  const Shared ups(space), xs(space + (long long)positions * tile);
  const int groups = own.channels / width, group = threadIdx.x, channel = own.first + own.lane * KT_V;
  const Count count = {(double)positions * width, 1.0 / ((double)positions * width)};
  const long long row = own.sample * (channels / width) + own.group + group;
  if (group < groups) shared.found[group] = saved(count, mean[row], m2[row], h[0]);
  __syncthreads();

  kt_real terms[2][KT_V] = {}, weighted[2][KT_V];
  Wide high, low, rstd, weight;
  if (own.stop) {
    each_group(own.lane * KT_V, width, [&](int v, int group) {
      high.v[v] = shared.found[group].hi;
      low.v[v] = shared.found[group].lo;
      rstd.v[v] = shared.found[group].rstd;
      weight.v[v] = gamma ? gamma[channel + v] : kt_real(1);
    });
  }
#pragma unroll 2
  for (int p = own.row; p < own.stop; p += own.step) {
    const long long at = own.start + (long long)p * channels;
    const Data up = load<KT_V>(dy + at), value = load<KT_V>(x + at);
    ups.put(p * own.span + own.lane, up);
    xs.put(p * own.span + own.lane, value);
#pragma unroll
    for (int v = 0; v < KT_V; ++v) {
      terms[0][v] += widen(up.v[v]);
      terms[1][v] += widen(up.v[v]) * centred(widen(value.v[v]), high.v[v], low.v[v]);
    }
  }
#pragma unroll
  for (int v = 0; v < KT_V; ++v) {
    if (own.stop) terms[1][v] *= rstd.v[v];
    weighted[0][v] = own.stop ? terms[0][v] * weight.v[v] : kt_real(0);
    weighted[1][v] = own.stop ? terms[1][v] * weight.v[v] : kt_real(0);
  }
  group_sums(own, width, weighted, shared.stage, shared.sums);
  if (group < groups) {
    shared.means[2 * group] = (kt_real)(shared.sums[2 * group] * count.inverse);
    shared.means[2 * group + 1] = (kt_real)(shared.sums[2 * group + 1] * count.inverse * shared.found[group].rstd);
  }
  if (own.row < own.step) own.lay(terms, shared.stage);
  __syncthreads();
  own.add_rows(shared.stage, totals + 2 * own.sample * channels + own.first, channels);
  if (!own.stop) return;
  Wide mean_g, slope;
  each_group(own.lane * KT_V, width, [&](int v, int group) {
    mean_g.v[v] = shared.means[2 * group];
    slope.v[v] = shared.means[2 * group + 1];
  });
#pragma unroll 2
  for (int p = own.row; p < own.stop; p += own.step) {
    const Data up = ups.get(p * own.span + own.lane), value = xs.get(p * own.span + own.lane);
    Wide out;
#pragma unroll
    for (int v = 0; v < KT_V; ++v) {
      const kt_real d = centred(widen(value.v[v]), high.v[v], low.v[v]);
      out.v[v] = gradient(widen(up.v[v]) * weight.v[v], d, rstd.v[v], mean_g.v[v], slope.v[v]);
    }
    store<KT_V>(dx + own.start + (long long)p * channels, narrow_all<KT_T>(out));
  }
}
