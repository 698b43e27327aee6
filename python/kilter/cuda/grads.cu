#include "tensors.cuh"
// What is read of all gradients before a step, and clipping outside of one: one launch for all tensors.

const int KT_V = 16 / sizeof(KT_T);

// V elements that may lie anywhere.
template <int V> KT_DEVICE Vec<kt_real, V> load_any(const KT_T* p) {
  Vec<kt_real, V> x;
#pragma unroll
  for (int v = 0; v < V; ++v) x.v[v] = widen(p[v]);
  return x;
}

// A lane adds the same elements in the same order whether they are aligned or not. A sum of x * 0 stays zero as long as
// every x is finite.
template <int V, bool WIDE> KT_DEVICE void look(const KT_T* g, int n, double& squares, kt_real& bad) {
#pragma unroll 1
  for (int i = kt_lane() * V; i < n; i += 32 * V) {
    Vec<kt_real, V> x;
    if (WIDE) x = load_wide<V>(g + i);
    else x = load_any<V>(g + i);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      squares += (double)x.v[v] * (double)x.v[v];
      bad += x.v[v] * kt_real(0);
    }
  }
}

// out <- (sum of the squares, 1 or 0 for whether all are finite), or, unless it is the first, joined with what is there.
// `partial` has two numbers for each block; the last block adds them up.
KT_KERNEL(256, 4) scan(const Tensor* tensors, const Chunk* chunks, int count, double* partial, unsigned* ticket, int first,
                       double* out) {
  KT_SHARED(double, scratch, 64);
  double squares = 0.0;
  kt_real bad = 0;
  for (int c = kt_first_chunk(); c < count; c += kt_warps()) {
    const Chunk chunk = chunks[c];
    const Tensor& t = tensors[chunk.tensor];
    const KT_T* g = (const KT_T*)t.g + chunk.from();
    const int n = chunk.length(t), whole = n / KT_V * KT_V;
    if (t.wide_g) look<KT_V, true>(g, whole, squares, bad);
    else look<KT_V, false>(g, whole, squares, bad);
    look<1, false>(g + whole, n - whole, squares, bad);
  }
  double found[2] = {squares, (double)bad}, sums[2];
  block_sums(found, scratch, sums);
  if (threadIdx.x == 0) partial[2 * blockIdx.x] = sums[0], partial[2 * blockIdx.x + 1] = sums[1];
  if (!kt_last_block(ticket, gridDim.x)) return;
  found[0] = found[1] = 0.0;
  for (int b = threadIdx.x; b < gridDim.x; b += blockDim.x) {
    found[0] += partial[2 * b];
    found[1] += partial[2 * b + 1];
  }
  block_sums(found, scratch, sums);
  if (threadIdx.x == 0) {
    out[0] = first ? sums[0] : out[0] + sums[0];
    out[1] = sums[1] == 0.0 && (first || out[1] != 0.0) ? 1.0 : 0.0;
  }
}

template <int V> KT_DEVICE void limit(KT_T* g, int n, kt_real scale, kt_real most) {
#pragma unroll 1
  for (int i = kt_lane() * V; i < n; i += 32 * V) {
    Vec<kt_real, V> x = load_wide<V>(g + i);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      kt_real y = x.v[v] * scale;
      y = y > most ? most : y;
      x.v[v] = y < -most ? -most : y;
    }
    store<V>(g + i, narrow_all<KT_T, V>(x));
  }
}

// g <- clamp(scale g, +- most), in place, h = (scale, most), most at most the largest number; NaN stays NaN. Gradients are in the place of parameters.
KT_KERNEL(256, 4) clip(const Tensor* tensors, const Chunk* chunks, int count, Scalars<2> h) {
  const double top = sizeof(kt_real) == 4 ? 3.4028234663852886e38 : h[1];
  const kt_real scale = h[0], most = h[1] < top ? h[1] : top;
  for (int c = kt_first_chunk(); c < count; c += kt_warps()) {
    const Chunk chunk = chunks[c];
    const Tensor& t = tensors[chunk.tensor];
    KT_T* g = (KT_T*)t.p + chunk.from();
    const int n = chunk.length(t), whole = t.wide_g ? n / KT_V * KT_V : 0;
    limit<KT_V>(g, whole, scale, most);
    limit<1>(g + whole, n - whole, scale, most);
  }
}
