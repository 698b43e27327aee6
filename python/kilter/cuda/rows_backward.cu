#include "rows.cuh"
// Backward of layer norm and RMS norm, and of group norm with channels first and small planes: dx, and the sums over all
// rows of dy and dy * x̂ for each place of a row, from one look at dy and x.

const int MOST = 512;  // threads of a block
// Vectors of a row that a thread has at most: one; or with KT_MANY four, or as many as have 16 places.
const int VECTORS = !KT_MANY ? 1 : KT_V > 4 ? 16 / KT_V : 4;

// Blocks that a multiprocessor is to hold: few sums are no reason for fewer threads.
const int RESIDENT = KT_MANY || sizeof(KT_T) == 8 ? 1 : 2;

// What a thread adds up for its places over the rows that it walks.
struct Gradients {
  Wide dy[VECTORS], dy_xhat[VECTORS];
};

// Adds the places of each channel, and the block's walks if they are `merged`, in a fixed order, and writes the sums to a
// row of `partial`: those of dy from `to` on, and those of dy * x̂ `all` places behind.
KT_DEVICE void write_sums(const Gradients& sums, int width, int inner, bool merged, kt_real* to,
                          long long all) {
  KT_SHARED(kt_real, stage, 2 * MOST * KT_V);
  const int span = blockDim.x * KT_V, walks = merged ? blockDim.y : 1, own = merged ? 0 : threadIdx.y;
  const int first = merged ? threadIdx.y * blockDim.x + threadIdx.x : threadIdx.x, step = blockDim.x * walks;
#pragma unroll 1
  for (int from = 0; from < VECTORS * span; from += span) {
    const int end = min(width, from + span);
    kt_real* const mine = stage + 2 * threadIdx.y * span + threadIdx.x * KT_V;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      if (k * span != from) continue;
#pragma unroll
      for (int v = 0; v < KT_V; ++v) {
        mine[v] = sums.dy[k].v[v];
        mine[span + v] = sums.dy_xhat[k].v[v];
      }
    }
    __syncthreads();
    const int c0 = from / inner, channels = (end - 1) / inner + 1 - c0;
#pragma unroll 1
    for (int j = first; j < 2 * channels && to; j += step) {
      const int q = j >= channels, c = c0 + j - q * channels;
      const int start = max(c * inner, from), stop = min(c * inner + inner, end);
      double sum = start > c * inner ? to[q * all + c] : 0.0;  // of a channel that began in the part before
      for (int w = own; w < own + walks; ++w) {
        for (int i = start; i < stop; ++i) sum += stage[(2 * w + q) * span + i - from];
      }
      to[q * all + c] = (kt_real)sum;
    }
  }
}

// Rows are n * groups + group. A walk, of the threads of one threadIdx.y, goes through the rows of one group, samples
// part, part + parts, ..., and block column j through the places from j * width on of rows of `pitch` places: a row has
// more than one only where its sums are `given`, mean and slope. hi is null for RMS norm; group norm has mean and m2.
KT_KERNEL(512, RESIDENT) backward(const KT_T* dy, const KT_T* x, const kt_real* gamma, const kt_real* hi,
                                  const kt_real* lo, const kt_real* rstd, const double* mean, const double* m2,
                                  const kt_real* given, const KT_T* dsum, KT_T* dx, kt_real* partial,
                                  long long samples, int parts, int columns, long long pitch, int width,
                                  double inverse, int groups, unsigned inner, unsigned factor, int shift,
                                  Scalars<1> h) {
  KT_SHARED(double, scratch, 128);
  const int block = blockIdx.x / columns, walk = block * blockDim.y + threadIdx.y;
  const int group = walk % groups, part = walk / groups;
  const long long place = (long long)(blockIdx.x - block * columns) * width, channels = pitch / inner;
  const int span = (int)min((long long)width, pitch - place);
  const Channels places = {(int)inner, {inner, factor, shift}};
  const Count count = {(double)pitch, inverse};
  if (gamma) gamma += group * channels + place;

  Gradients sums = {};
  double* turn = scratch;
  for (long long round = 0; round * parts < samples; ++round, turn = scratch + (turn == scratch) * 64) {
    const long long sample = round * parts + part, row = sample * groups + group, start = row * pitch + place;
    const int n = part < parts && sample < samples ? span / KT_V : 0;
    Saved s = {0, 0, 0};
    if (n && mean) s = saved(count, mean[row], m2[row], h[0]);
    if (n && rstd) s = Saved{hi ? hi[row] : 0, hi ? lo[row] : 0, rstd[row]};

    Registers<VECTORS> ups, xs;
    ups.fill(n, [&](int i) { return load<KT_V>(dy + start + i * KT_V); });
    xs.fill(n, [&](int i) { return load<KT_V>(x + start + i * KT_V); });
    kt_real mean_g = 0, slope = 0;
    if (given) {
      if (n) mean_g = given[3 * row], slope = given[3 * row + 1];
    } else {
      kt_real terms[2] = {0, 0};
      double totals[2];
#pragma unroll
      for (int k = 0; k < VECTORS; ++k) {
        const int i = threadIdx.x + k * blockDim.x;
        if (i >= n) continue;
        const Wide weights = places.of(gamma, 1, i * KT_V);
#pragma unroll
        for (int v = 0; v < KT_V; ++v) {
          const kt_real g = widen(ups.kept[k].v[v]) * weights.v[v];
          terms[0] += g;
          terms[1] += g * centred(widen(xs.kept[k].v[v]), s.hi, s.lo);
        }
      }
      row_sums(terms, turn, totals);
      if (hi || mean) mean_g = (kt_real)(totals[0] * inverse);
      slope = (kt_real)(totals[1] * inverse * (double)s.rstd * (double)s.rstd);
    }
#pragma unroll
    for (int k = 0; k < VECTORS; ++k) {
      const int i = threadIdx.x + k * blockDim.x;
      if (i >= n) continue;
      const Wide weights = places.of(gamma, 1, i * KT_V);
      Wide out;
#pragma unroll
      for (int v = 0; v < KT_V; ++v) {
        const kt_real up = widen(ups.kept[k].v[v]), d = centred(widen(xs.kept[k].v[v]), s.hi, s.lo);
        out.v[v] = gradient(up * weights.v[v], d, s.rstd, mean_g, slope);
        sums.dy[k].v[v] += up;
        sums.dy_xhat[k].v[v] += up * (d * s.rstd);
      }
      const long long at = start + i * KT_V;
      if (dsum) {
        const Wide more = load_wide<KT_V>(dsum + at);
#pragma unroll
        for (int v = 0; v < KT_V; ++v) out.v[v] += more.v[v];
      }
      store<KT_V>(dx + at, narrow_all<KT_T>(out));
    }
  }
  // A partial row per block where all its walks are of one group, else one per part.
  const bool merged = groups == 1;
  const long long all = groups * channels, to = 2 * all * (merged ? block : part) + group * channels + place;
  write_sums(sums, span, inner, merged, merged || part < parts ? partial + to : nullptr, all);
}
