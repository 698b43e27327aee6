// Elementwise kernels on flat arrays: averages, and the yardsticks of memory speed.

KT_DEVICE kt_real mix(kt_real s, kt_real x, kt_real momentum) { return s + momentum * (x - s); }

// s <- s + momentum * (x - s): V elements a thread, what is left over one by one in the last thread.
KT_KERNEL(256) ema(kt_real* s, const KT_T* x, kt_index n, Scalars<1> h) {
  const kt_real momentum = (kt_real)h[0];
  kt_index i = (kt_index)grid_thread() * KT_V;
  if (i >= n) return;
  if (n - i >= KT_V) {
    Vec<kt_real, KT_V> old = load<KT_V>(s + i), now = load_wide<KT_V>(x + i);
#pragma unroll
    for (int k = 0; k < KT_V; ++k) old.v[k] = mix(old.v[k], now.v[k], momentum);
    store<KT_V>(s + i, old);
  } else {
#pragma unroll 1
    for (; i < n; ++i) s[i] = mix(s[i], widen(x[i]), momentum);
  }
}

template <int V>
KT_DEVICE void add(const unsigned long long* inputs, int reads, const unsigned long long* arrays, int writes, kt_index i) {
  Vec<kt_real, V> sum = load_wide<V>((const KT_T*)inputs[0] + i);
#pragma unroll 4
  for (int r = 1; r < reads; ++r) {
    Vec<kt_real, V> x = load_wide<V>((const KT_T*)inputs[r] + i);
#pragma unroll
    for (int k = 0; k < V; ++k) sum.v[k] += x.v[k];
  }
#pragma unroll 4
  for (int w = 0; w < writes; ++w) {
    KT_T* to = (KT_T*)arrays[w] + i;
    Vec<kt_real, V> x = load_wide<V>(to);
#pragma unroll
    for (int k = 0; k < V; ++k) x.v[k] += sum.v[k];
    store<V>(to, narrow_all<KT_T, V>(x));
  }
}

KT_KERNEL(256) copy(const KT_T* source, KT_T* target, kt_index n) {
  kt_index i = (kt_index)grid_thread() * KT_V;
  if (i >= n) return;
  if (n - i >= KT_V) {
    stream<KT_V>(target + i, load<KT_V>(source + i));
  } else {
#pragma unroll 1
    for (; i < n; ++i) target[i] = source[i];
  }
}

// Adds the sum of `reads` arrays to each of `writes` others; tables of their addresses. Compilers that are left to choose aim
// at eight blocks of it for a multiprocessor of sm_100, where registers do not suffice.
KT_KERNEL(256, 4) update(const unsigned long long* inputs, int reads, const unsigned long long* arrays, int writes,
                         kt_index n) {
  kt_index i = (kt_index)grid_thread() * KT_V;
  if (i >= n) return;
  const bool whole = n - i >= KT_V;
#pragma unroll 1
  for (const kt_index end = whole ? i + KT_V : n; i < end; i += whole ? KT_V : 1) {
    if (whole) add<KT_V>(inputs, reads, arrays, writes, i);
    else add<1>(inputs, reads, arrays, writes, i);
  }
}
