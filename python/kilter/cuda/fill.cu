// Fills: element i is a pure function of (seed, stream, i), the same bits as on the CPU. Compiled without contraction.

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011).
KT_DEVICE void philox_words(unsigned (&c)[4], unsigned k0, unsigned k1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    unsigned long long p0 = (unsigned long long)c[0] * 0xD2511F53u, p1 = (unsigned long long)c[2] * 0xCD9E8D57u;
    c[0] = (unsigned)(p1 >> 32) ^ c[1] ^ k0;
    c[1] = (unsigned)p1;
    c[2] = (unsigned)(p0 >> 32) ^ c[3] ^ k1;
    c[3] = (unsigned)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// 24 bits of a word as a number in [0, 1).
KT_DEVICE float unit(unsigned word) { return (float)(int)(word >> 8) * (1.0f / 16777216.0f); }

// Within 2 ulp for a in (0, 1]: exponent, and a polynomial in (m - 1) / (m + 1) of the mantissa m in [sqrt(1/2), sqrt(2)).
KT_DEVICE float logarithm(float a) {
  unsigned bits = __float_as_uint(a);
  int exponent = (int)(bits - 0x3F3504F3u) >> 23;
  float m = __uint_as_float(bits - ((unsigned)exponent << 23));
  float f = m - 1.0f;
  float s = f / (2.0f + f);
  float z = s * s;
  float r = z * ((0.28498787f * z + 0.39999998f) * z + 0.6666666f);
  return (float)exponent * 0.69314718f + (2.0f * s + s * r);
}

// sin and cos of 2 pi v, v in [0, 1): the nearest quarter turn, and polynomials in what is left.
KT_DEVICE void sin_cos_turns(float v, float& sine, float& cosine) {
  const float rounding = 12582912.0f;  // 1.5 * 2^23
  float shifted = v * 4.0f + rounding;
  unsigned quarter = __float_as_uint(shifted);
  float r = (v * 4.0f - (shifted - rounding)) * 1.5707964f;
  float z = r * r;
  float s = ((-1.9515296e-4f * z + 8.332161e-3f) * z - 1.6666655e-1f) * (z * r) + r;
  float c = ((2.4433157e-5f * z - 1.3887316e-3f) * z + 4.1666646e-2f) * (z * z) + (-0.5f * z + 1.0f);
  bool odd = quarter & 1u;
  sine = __uint_as_float(__float_as_uint(odd ? c : s) ^ (quarter & 2u) << 30);
  cosine = __uint_as_float(__float_as_uint(odd ? s : c) ^ (quarter + 1u & 2u) << 30);
}

// What is made of the four words of a counter: shift + scale * variate, product and sum rounded separately.
struct Uniform {
  kt_real shift, scale;
  KT_DEVICE void operator()(const unsigned (&w)[4], KT_T (&out)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = narrow<KT_T>(shift + scale * (kt_real)unit(w[k]));
  }
};

// Box, Muller 1958.
struct Normal {
  kt_real shift, scale;
  KT_DEVICE void operator()(const unsigned (&w)[4], KT_T (&out)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      float a = (float)(int)((w[k] >> 8) + 1u) * (1.0f / 16777216.0f);  // in (0, 1]: its logarithm is finite
      float r = sqrtf(-2.0f * logarithm(a)), sine, cosine;
      sin_cos_turns(unit(w[k + 1]), sine, cosine);
      out[k] = narrow<KT_T>(shift + scale * (kt_real)(r * cosine));
      out[k + 1] = narrow<KT_T>(shift + scale * (kt_real)(r * sine));
    }
  }
};

struct Words {
  KT_DEVICE void operator()(const unsigned (&w)[4], unsigned (&out)[4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) out[k] = w[k];
  }
};

// Element 64 b + 16 k + l has word k of counter (16 b + l, stream, attempt). A thread makes V adjacent counters and writes
// V elements for each k; threads start at counter `first`. With V > 1 the elements are whole groups of 64.
template <int V, typename T, typename Make>
KT_DEVICE void fill(T* out, long long n, unsigned long long seed, unsigned stream, unsigned attempt, long long first,
                    const Make& make) {
  const long long counter = first + grid_thread() * V;
  const long long start = counter / 16 * 64 + counter % 16;
  if (start >= n) return;
  Vec<T, V> values[4];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const unsigned long long number = counter + v;
    unsigned words[4] = {(unsigned)number, (unsigned)(number >> 32), stream, attempt};
    T made[4];
    philox_words(words, (unsigned)seed, (unsigned)(seed >> 32));
    make(words, made);
#pragma unroll
    for (int k = 0; k < 4; ++k) values[k].v[v] = made[k];
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (V > 1 || start + 16 * k < n) store<V>(out + start + 16 * k, values[k]);
  }
}

const int KT_V = 16 / sizeof(KT_T);

KT_KERNEL(256) fill_uniform(KT_T* out, long long n, unsigned long long seed, unsigned stream, unsigned attempt,
                            long long first, Scalars<2> h) {
  fill<KT_V>(out, n, seed, stream, attempt, first, Uniform{(kt_real)h[0], (kt_real)h[1]});
}

KT_KERNEL(256) fill_uniform_tail(KT_T* out, long long n, unsigned long long seed, unsigned stream, unsigned attempt,
                                 long long first, Scalars<2> h) {
  fill<1>(out, n, seed, stream, attempt, first, Uniform{(kt_real)h[0], (kt_real)h[1]});
}

KT_KERNEL(256) fill_normal(KT_T* out, long long n, unsigned long long seed, unsigned stream, unsigned attempt,
                           long long first, Scalars<2> h) {
  fill<KT_V>(out, n, seed, stream, attempt, first, Normal{(kt_real)h[0], (kt_real)h[1]});
}

KT_KERNEL(256) fill_normal_tail(KT_T* out, long long n, unsigned long long seed, unsigned stream, unsigned attempt,
                                long long first, Scalars<2> h) {
  fill<1>(out, n, seed, stream, attempt, first, Normal{(kt_real)h[0], (kt_real)h[1]});
}

KT_KERNEL(256) philox(unsigned* out, long long n, unsigned long long seed, unsigned stream, unsigned attempt) {
  fill<1>(out, n, seed, stream, attempt, 0, Words());
}
