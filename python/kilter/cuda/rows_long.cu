#include "rows.cuh"
// Rows, or planes of channels, in parts of which each block has one or a few: moments, what is written from them, and the
// sums that the backward begins with.

const int VECTORS = 4;  // of a part of a row, that a thread has at most

// Blocks of `gradient_long` that a multiprocessor is to hold: as many as there are registers for without spills.
#if __CUDA_ARCH__ >= 1000
const int RESIDENT = 2;
#else
const int RESIDENT = 3;
#endif

// Part p of a row has vectors p * blockDim.x * VECTORS ...
struct Part {
  long long row, start;  // the row, and its place in it
  int index, n;          // the part's number in the row, and its vectors
  KT_DEVICE Part(long long width, int parts) {
    row = blockIdx.x / parts;
    index = blockIdx.x - (int)(row * parts);
    start = (long long)index * blockDim.x * VECTORS * KT_V;
    n = (int)min((width - start) / KT_V, (long long)blockDim.x * VECTORS);
  }
};

// The channels from place `from` of a row on, and how many come before.
KT_DEVICE Channels channels_from(long long from, long long inner, unsigned factor, int shift, long long& before) {
  const long long most = 0x7fffffffll;
  before = from / inner;
  return Channels{(int)min(inner - (from - before * inner), most), {(unsigned)min(inner, most), factor, shift}};
}

// The moments of a part: (count, mean, m2). Reads x (and residual), writes the sum.
KT_KERNEL(256) moments(const KT_T* x, const KT_T* residual, KT_T* sum, double* partial, long long width, int parts,
                       int is_centred) {
  KT_SHARED(double, scratch, 96);
  const Part part(width, parts);
  const long long at = part.row * width + part.start;
  const double values = (double)part.n * KT_V;
  Registers<VECTORS> kept;
  kept.fill(part.n, Source{x + at, residual ? residual + at : residual, sum + at});
  const Moments<double> found = statistics(kept, part.n, Count{values, 1.0 / values}, is_centred, scratch);
  if (threadIdx.x) return;
  double* const to = partial + 3ll * blockIdx.x;
  to[0] = found.count;
  to[1] = found.mean;
  to[2] = found.m2;
}

// y of a part, from hi (null for RMS norm), lo and rstd, or from mean and m2. Reads x, writes y.
KT_KERNEL(256, 2) apply(const KT_T* x, const kt_real* gamma, const kt_real* beta, const kt_real* hi, const kt_real* lo,
                        const kt_real* rstd, const double* mean, const double* m2, KT_T* y, long long width, int parts,
                        int groups, int channels, long long inner, unsigned factor, int shift, Scalars<1> h) {
  const Part part(width, parts);
  const long long row = part.row, at = row * width + part.start;
  const Count count = {(double)width, 1.0 / (double)width};
  const Saved s = mean ? saved(count, mean[row], m2[row], h[0]) : Saved{hi ? hi[row] : 0, hi ? lo[row] : 0, rstd[row]};
  long long before;
  const Channels places = channels_from(part.start, inner, factor, shift, before);
  const Affine affine(s, gamma, beta, (long long)group_of(row, groups) * channels + before, places);
  Registers<VECTORS> kept;
  kept.fill(part.n, [&](int i) { return load<KT_V>(x + at + i * KT_V); });
  kept.each(part.n, [&](int i, const Data& value) { stream<KT_V>(y + at + i * KT_V, affine(value, i * KT_V)); });
}

// dx of a part, from mean and m2, and from `means`: for each row the mean of g = dy * gamma, the slope and rstd. Reads dy
// and x, writes dx.
KT_KERNEL(256, RESIDENT) gradient_long(const KT_T* dy, const KT_T* x, const kt_real* gamma, const double* mean,
                                       const kt_real* means, KT_T* dx, long long width, int parts, int groups,
                                       int channels, long long inner, unsigned factor, int shift) {
  const Part part(width, parts);
  const long long row = part.row, at = row * width + part.start;
  const kt_real hi = (kt_real)mean[row], lo = (kt_real)(mean[row] - (double)hi);
  const kt_real mean_g = means[3 * row], slope = means[3 * row + 1], rstd = means[3 * row + 2];
  long long before;
  const Channels places = channels_from(part.start, inner, factor, shift, before);
  if (gamma) gamma += (long long)group_of(row, groups) * channels + before;
  Registers<VECTORS> ups, xs;
  ups.fill(part.n, [&](int i) { return load<KT_V>(dy + at + i * KT_V); });
  xs.fill(part.n, [&](int i) { return load<KT_V>(x + at + i * KT_V); });
#pragma unroll
  for (int k = 0; k < VECTORS; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i >= part.n) continue;
    const Wide weights = places.of(gamma, 1, i * KT_V);
    Wide out;
#pragma unroll
    for (int v = 0; v < KT_V; ++v) {
      const kt_real g = widen(ups.kept[k].v[v]) * weights.v[v];
      out.v[v] = gradient(g, centred(widen(xs.kept[k].v[v]), hi, lo), rstd, mean_g, slope);
    }
    stream<KT_V>(dx + at + i * KT_V, narrow_all<KT_T>(out));
  }
}

// Of each part of `per` vectors of a row, and for each threadIdx.y one: the sums of g = dy * gamma and g * (x - mean).
// Rows are channels of samples, `sharing` of which have one mean: `partial` has shape (samples, parts, 2, channels).
KT_KERNEL(256) sums(const KT_T* dy, const KT_T* x, const kt_real* gamma, const kt_real* hi, const kt_real* lo,
                    const double* mean, double* partial, long long rows, long long width, int parts, int per,
                    int channels, int sharing) {
  KT_SHARED(double, scratch, 64);
  const long long unit = (long long)blockIdx.x * blockDim.y + threadIdx.y, row = unit / parts;
  const int part = (int)(unit - row * parts);
  const long long start = (long long)part * per * KT_V, at = row * width + start;
  const int n = row < rows ? (int)min((width - start) / KT_V, (long long)per) : 0;
  kt_real high = 0, low = 0, terms[2] = {0, 0};
  if (n && mean) {
    high = (kt_real)mean[row / sharing];
    low = (kt_real)(mean[row / sharing] - (double)high);
  } else if (n && hi) {
    high = hi[row];
    low = lo[row];
  }
#pragma unroll 4
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const Wide up = load_wide<KT_V>(dy + at + i * KT_V), value = load_wide<KT_V>(x + at + i * KT_V);
    const Wide weights = Channels{0, {1}}.of(gamma ? gamma + start : gamma, 1, i * KT_V);
#pragma unroll
    for (int v = 0; v < KT_V; ++v) {
      const kt_real g = up.v[v] * weights.v[v];
      terms[0] += g;
      terms[1] += g * centred(value.v[v], high, low);
    }
  }
  double total[2];
  row_sums(terms, scratch, total);
  if (row >= rows || threadIdx.x) return;
  const long long sample = row / channels;
  double* const to = partial + (sample * parts + part) * 2 * channels + (row - sample * channels);
  to[0] = total[0];
  to[channels] = total[1];
}
