// Rows, each normalised by itself: their threads, statistics and affine maps. For texts that begin with
// `#include "rows.cuh"`.
//
// A row, or a chunk of one, starts at a 64-bit offset; places in it are vectors of V elements with 32-bit numbers. It
// has the threads of one threadIdx.y: 8, 16, or whole warps, all of which call what sums over them.

typedef Vec<KT_T, KT_V> Data;
typedef Vec<kt_real, KT_V> Wide;

KT_DEVICE kt_real centred(kt_real x, kt_real hi, kt_real lo) { return (x - hi) - lo; }

// The gradient of x, from g = dy * gamma and d = x - mean; `mean` is that of g, `slope` rstd² times that of g * d.
KT_DEVICE kt_real gradient(kt_real g, kt_real d, kt_real rstd, kt_real mean, kt_real slope) {
  return ((g - mean) - d * slope) * rstd;
}

// Sums of N values over a row's threads, the same bits in each: in kt_real over up to a warp; else in float64, warps in
// their order, through `scratch` for 32 * N doubles, which may be used again after the next barrier of the block.
template <int N> KT_DEVICE void row_sums(const kt_real (&x)[N], double* scratch, double (&sums)[N]) {
  if (blockDim.x <= 32) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      kt_real sum = x[k];
      for (int offset = blockDim.x / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(KT_WARP, sum, offset);
      sums[k] = sum;
    }
    return;
  }
  const int warps = blockDim.x / 32;
  double* const row = scratch + threadIdx.y * warps * N;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    double sum = warp_sum((double)x[k]);
    if (threadIdx.x % 32 == 0) row[threadIdx.x / 32 * N + k] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) sums[k] = 0.0;
  for (int w = 0; w < warps; ++w) {
#pragma unroll
    for (int k = 0; k < N; ++k) sums[k] += row[w * N + k];
  }
}

// --------------------------------------------------------------------------- a row on the chip

// The vectors of a row that are this thread's: numbers threadIdx.x + k * blockDim.x below n. In registers ...
template <int K> struct Registers {
  Data kept[K];

  Registers() = default;
  KT_DEVICE explicit Registers(KT_T*) {}
  template <typename F> KT_DEVICE void fill(int n, const F& make) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int i = threadIdx.x + k * blockDim.x;
      if (i < n) kept[k] = make(i);
    }
  }
  template <typename F> KT_DEVICE void each(int n, const F& use) const {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int i = threadIdx.x + k * blockDim.x;
      if (i < n) use(i, kept[k]);
    }
  }
};

// ... or in shared memory, each thread's for itself.
struct Shared {
  KT_T* kept;

  KT_DEVICE explicit Shared(KT_T* space) : kept(space) {}
  KT_DEVICE void put(int i, const Data& x) const {
    Packed<KT_T, KT_V> packed;
    packed.vec = x;
#pragma unroll
    for (int w = 0; w < Packed<KT_T, KT_V>::words; ++w)
      reinterpret_cast<typename Packed<KT_T, KT_V>::word*>(kept + i * KT_V)[w] = packed.w[w];
  }
  KT_DEVICE Data get(int i) const { return load<KT_V>(kept + i * KT_V); }

  template <typename F> KT_DEVICE void fill(int n, const F& make) {
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += blockDim.x) put(i, make(i));
  }
  template <typename F> KT_DEVICE void each(int n, const F& use) const {
#pragma unroll 2
    for (int i = threadIdx.x; i < n; i += blockDim.x) use(i, get(i));
  }
};

// A number of values, and one over it: a division takes a thread as long as a vector of data.
struct Count {
  double count, inverse;
  // x / count, rounded once more than a division: exact where that is.
  KT_DEVICE double share(double x) const {
    const double q = x * inverse;
    return fma(fma(-q, count, x), inverse, q);
  }
};

// About what to sum differences, from a sum of all values: their mean in the precision of the data.
KT_DEVICE kt_real nearby(double total, Count count) {
  const kt_real about = widen(narrow<KT_T>((kt_real)(total * count.inverse)));
  return about - about == 0 ? about : kt_real(0);
}

// Moments from the sum of all values, and those of the differences from `about` and of their squares. The first
// difference corrects both moments, the variance of equal values to exactly zero. But where the mean is small beside the
// spread, differences lose the digits that it has beyond those of the values, always in the same direction.
KT_DEVICE Moments<double> moments_about(kt_real about, Count count, double total, double first, double second) {
  const double shift = count.share(first), m2 = second - shift * first;
  const bool small = 9.0 * total * total * count.inverse < second;
  return Moments<double>{count.count, small ? count.share(total) : (double)about + shift, m2 < 0.0 ? 0.0 : m2};
}

// The moments of a row's values, the same bits in each of its threads. Not centred: mean 0, and the sum of squares.
// `scratch` holds 96 doubles.
template <typename Kept>
KT_DEVICE Moments<double> statistics(const Kept& kept, int n, Count count, bool is_centred, double* scratch) {
  kt_real values[1] = {0}, differences[2] = {0, 0}, about = 0;
  double total[1] = {0.0}, sums[2];
  if (is_centred) {
    kept.each(n, [&](int, const Data& x) {
#pragma unroll
      for (int v = 0; v < KT_V; ++v) values[0] += widen(x.v[v]);
    });
    row_sums(values, scratch + 64, total);
    about = nearby(total[0], count);
  }
  kept.each(n, [&](int, const Data& x) {
#pragma unroll
    for (int v = 0; v < KT_V; ++v) {
      const kt_real d = widen(x.v[v]) - about;
      differences[0] += d;
      differences[1] += d * d;
    }
  });
  row_sums(differences, scratch, sums);
  return is_centred ? moments_about(about, count, total[0], sums[0], sums[1]) : Moments<double>{count.count, 0.0, sums[1]};
}

// A vector of x, or of x + residual, which goes to `sum`.
struct Source {
  const KT_T *x, *residual;
  KT_T* sum;

  KT_DEVICE Data operator()(int i) const {
    Data value = load<KT_V>(x + i * KT_V);
    if (residual) {
      const Data other = load<KT_V>(residual + i * KT_V);
#pragma unroll
      for (int v = 0; v < KT_V; ++v) value.v[v] = narrow<KT_T>(widen(value.v[v]) + widen(other.v[v]));
      store<KT_V>(sum + i * KT_V, value);
    }
    return value;
  }
};

// --------------------------------------------------------------------------- what is applied to a row

// The mean, as hi + lo, and 1 / sqrt(var + eps).
struct Saved {
  kt_real hi, lo, rstd;
};

KT_DEVICE Saved saved(Count count, double mean, double m2, double eps) {
  const kt_real hi = (kt_real)mean;
  return Saved{hi, (kt_real)(mean - (double)hi), kt_real(1) / root((kt_real)(m2 * count.inverse + eps))};
}

// Division by a number of at least 1: n / by = n * factor >> shift for n below 2^31.
struct Divisor {
  unsigned by, factor;
  int shift;
  KT_DEVICE unsigned operator()(unsigned n) const { return (unsigned)((unsigned long long)n * factor >> shift); }
};

// Which of `groups` groups a row is.
KT_DEVICE int group_of(long long row, int groups) {
  return row < 0x80000000ll ? (int)((unsigned)row % (unsigned)groups) : (int)(row % groups);
}

// The channels of a run of places: `first` places are of the first, `inner.by` of each that follows.
struct Channels {
  int first;
  Divisor inner;

  // The values of a vector's places, from those of the channels; none are `missing`.
  KT_DEVICE Wide of(const kt_real* values, kt_real missing, int place) const {
    Wide out;
    if (!values) {
#pragma unroll
      for (int v = 0; v < KT_V; ++v) out.v[v] = missing;
      return out;
    }
    if (inner.by == 1) return load<KT_V>(values + place);
    int room = first - place;
    if (room <= 0) {
      const unsigned beyond = -room, channels = inner(beyond);
      values += channels + 1;
      room = inner.by - (beyond - channels * inner.by);
    }
    kt_real value = *values;
#pragma unroll
    for (int v = 0; v < KT_V; ++v) {
      out.v[v] = value;
      if (--room == 0 && v + 1 < KT_V) {
        room = inner.by;
        value = *++values;
      }
    }
    return out;
  }
};

// y = (x - mean) * (gamma * rstd) + beta of the vector at a place.
struct Affine {
  Saved s;
  const kt_real *gamma, *beta;  // from the row's first channel on
  Channels places;

  KT_DEVICE Affine(const Saved& s, const kt_real* gamma, const kt_real* beta, long long first, const Channels& places)
      : s(s), gamma(gamma ? gamma + first : gamma), beta(beta ? beta + first : beta), places(places) {}

  KT_DEVICE Data operator()(const Data& x, int place) const {
    const Wide g = places.of(gamma, 1, place), b = places.of(beta, 0, place);
    Wide y;
#pragma unroll
    for (int v = 0; v < KT_V; ++v) y.v[v] = centred(widen(x.v[v]), s.hi, s.lo) * (g.v[v] * s.rstd) + b.v[v];
    return narrow_all<KT_T>(y);
  }
};
