#include "rows.cuh"
// Rows that are kept on the chip, forward: layer norm (Ba, Kiros, Hinton 2016, arXiv:1607.06450), RMS norm (Zhang,
// Sennrich 2019, arXiv:1910.07467), and group norm (Wu, He 2018, arXiv:1803.08494) with channels first, whose rows are
// the groups of the samples.

// KT_K is the most vectors that a thread has of a row in its registers; 0: the row lies in shared memory, of which there
// are width * sizeof(KT_T) bytes, and is the only one of its block.
#if KT_K
typedef Registers<KT_K> Kept;
#else
typedef Shared Kept;
#endif

// x is read once, y (and the sum) written once. A block has blockDim.y rows. hi is null for RMS norm; group norm has mean
// and m2 in its place.
KT_KERNEL(512, 1) forward(const KT_T* x, const KT_T* residual, const kt_real* gamma, const kt_real* beta, kt_real* hi,
                          kt_real* lo, kt_real* rstd, double* mean, double* m2, KT_T* sum, KT_T* y, long long rows,
                          int width, double inverse, int groups, int channels, unsigned inner, unsigned factor,
                          int shift, Scalars<1> h) {
  KT_SHARED(double, scratch, 96);
  KT_DYN_SHARED(KT_T, space);
  const long long row = (long long)blockIdx.x * blockDim.y + threadIdx.y, start = row * width;
  const bool there = row < rows;
  const int n = there ? width / KT_V : 0;
  const Count count = {(double)width, inverse};
  Kept kept(space);
  kept.fill(n, Source{x + start, residual ? residual + start : residual, sum + start});
  const Moments<double> found = statistics(kept, n, count, hi || mean, scratch);
  const Saved s = saved(count, found.mean, found.m2, h[0]);
  const int group = groups > 1 ? group_of(row, groups) : 0;
  const Affine affine(s, gamma, beta, group * channels, Channels{(int)inner, {inner, factor, shift}});
  kept.each(n, [&](int i, const Data& value) { store<KT_V>(y + start + i * KT_V, affine(value, i * KT_V)); });
  if (!there || threadIdx.x) return;
  if (hi) {
    hi[row] = s.hi;
    lo[row] = s.lo;
  }
  if (rstd) rstd[row] = s.rstd;
  if (mean) {
    mean[row] = found.mean;
    m2[row] = found.m2;
  }
}
