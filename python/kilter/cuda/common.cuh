// What every kernel file begins with: number types, vector access, reductions in a fixed order, scalars, barriers.
//
// The host joins this text and one family's into a module, with macros: KT_T (the storage type: float, double, half or
// bfloat16), KT_INDEX (32 or 64: bits of kt_index) and the family's own. No header is needed.
#ifndef KT_T
#define KT_T float
#endif
#ifndef KT_INDEX
#define KT_INDEX 32
#endif

#ifndef KT_CPU_SIM
#define KT_KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
#define KT_CLUSTER(size) __cluster_dims__(size, 1, 1)
#define KT_SHARED(T, name, count) __shared__ T name[count]
#define KT_DYN_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char kt_dynamic[];    \
  T* const name = reinterpret_cast<T*>(kt_dynamic)
#endif
#define KT_DEVICE __device__ __forceinline__

// --------------------------------------------------------------------------- number types

struct half {
  unsigned short bits;
};
struct bfloat16 {
  unsigned short bits;
};

#ifndef KT_CPU_SIM
KT_DEVICE float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
KT_DEVICE unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

// Rounds to nearest even; every NaN becomes one.
KT_DEVICE unsigned short float_to_bfloat16(float x) {
#if !defined(KT_CPU_SIM) && __CUDA_ARCH__ >= 800
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  unsigned u = __float_as_uint(x);
  unsigned short rounded = (unsigned short)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
  return (u & 0x7fffffffu) > 0x7f800000u ? (unsigned short)0x7fff : rounded;
#endif
}

// The type that kernels compute in: float, or double for double.
template <typename T> struct Arithmetic {
  typedef float type;
};
template <> struct Arithmetic<double> {
  typedef double type;
};
typedef Arithmetic<KT_T>::type kt_real;

#if KT_INDEX == 64
typedef long long kt_index;
#else
typedef int kt_index;
#endif

KT_DEVICE double widen(double x) { return x; }
KT_DEVICE float widen(float x) { return x; }
KT_DEVICE float widen(half x) { return half_to_float(x.bits); }
KT_DEVICE float widen(bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }

template <typename T> struct Narrow;
template <> struct Narrow<double> {
  static KT_DEVICE double of(double x) { return x; }
};
template <> struct Narrow<float> {
  static KT_DEVICE float of(float x) { return x; }
};
template <> struct Narrow<half> {
  static KT_DEVICE half of(float x) { return half{float_to_half(x)}; }
};
template <> struct Narrow<bfloat16> {
  static KT_DEVICE bfloat16 of(float x) { return bfloat16{float_to_bfloat16(x)}; }
};
// narrow<T>(x): x rounded once to the storage type T.
template <typename T> KT_DEVICE T narrow(typename Arithmetic<T>::type x) { return Narrow<T>::of(x); }

KT_DEVICE float root(float x) { return sqrtf(x); }
KT_DEVICE double root(double x) { return sqrt(x); }

// --------------------------------------------------------------------------- vector access

// V elements that move together, in words of at most 16 bytes. Pointers must be aligned to min(16, V * sizeof(T)).
template <typename T, int V> struct Vec {
  T v[V];
};

template <int BYTES> struct Word {
  typedef uint4 type;
};
template <> struct Word<8> {
  typedef uint2 type;
};
template <> struct Word<4> {
  typedef unsigned type;
};
template <> struct Word<2> {
  typedef unsigned short type;
};

template <typename T, int V> union Packed {
  typedef typename Word<sizeof(T) * V>::type word;
  static const int words = sizeof(T) * V / sizeof(word);
  Vec<T, V> vec;
  word w[words];
};

template <int V, typename T> KT_DEVICE Vec<T, V> load(const T* p) {
  Packed<T, V> packed;
#pragma unroll
  for (int i = 0; i < Packed<T, V>::words; ++i) packed.w[i] = reinterpret_cast<const typename Packed<T, V>::word*>(p)[i];
  return packed.vec;
}

// Explicit store instructions: an assignment of a struct may become one scalar store per element.
template <int V, typename T> KT_DEVICE void store(T* p, const Vec<T, V>& value) {
  Packed<T, V> packed;
  packed.vec = value;
#pragma unroll
  for (int i = 0; i < Packed<T, V>::words; ++i) __stwb(reinterpret_cast<typename Packed<T, V>::word*>(p) + i, packed.w[i]);
}

// A store of what is not read again soon.
template <int V, typename T> KT_DEVICE void stream(T* p, const Vec<T, V>& value) {
  Packed<T, V> packed;
  packed.vec = value;
#pragma unroll
  for (int i = 0; i < Packed<T, V>::words; ++i) __stcs(reinterpret_cast<typename Packed<T, V>::word*>(p) + i, packed.w[i]);
}

// V elements, in the arithmetic type.
template <int V, typename T> KT_DEVICE Vec<typename Arithmetic<T>::type, V> load_wide(const T* p) {
  Vec<T, V> x = load<V>(p);
  Vec<typename Arithmetic<T>::type, V> wide;
#pragma unroll
  for (int i = 0; i < V; ++i) wide.v[i] = widen(x.v[i]);
  return wide;
}

template <typename T, int V> KT_DEVICE Vec<T, V> narrow_all(const Vec<typename Arithmetic<T>::type, V>& wide) {
  Vec<T, V> x;
#pragma unroll
  for (int i = 0; i < V; ++i) x.v[i] = narrow<T>(wide.v[i]);
  return x;
}

// The number of this thread in the grid's x direction.
KT_DEVICE long long grid_thread() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }

// --------------------------------------------------------------------------- scalars that change from step to step

// By value from the host, or, where a CUDA graph must see them change, from a vector on the device.
template <int N> struct Scalars {
  const double* device;
  double host[N];
  KT_DEVICE double operator[](int i) const { return device ? device[i] : host[i]; }
};

// --------------------------------------------------------------------------- reductions in a fixed order

const unsigned KT_WARP = 0xffffffffu;

// The sum over a warp, the same bits in every lane; all 32 lanes must call it.
template <typename R> KT_DEVICE R warp_sum(R x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(KT_WARP, x, offset);
  return x;
}

// Sums of N values over a block of whole warps (at most 1,024 threads), the same bits in every thread: each warp's in R,
// then those of the warps in float64, in their order. `scratch` holds 32 * N doubles; it may be used again after the
// next barrier of the block.
template <int N, typename R> KT_DEVICE void block_sums(R (&x)[N], double* scratch, double (&sums)[N]) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int warps = blockDim.x * blockDim.y * blockDim.z / 32;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    R sum = warp_sum(x[k]);
    if (thread % 32 == 0) scratch[thread / 32 * N + k] = (double)sum;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k) sums[k] = 0.0;
  for (int w = 0; w < warps; ++w) {
#pragma unroll
    for (int k = 0; k < N; ++k) sums[k] += scratch[w * N + k];
  }
}

// Count, mean and centred second moment (Chan, Golub, LeVeque 1979).
template <typename R> struct Moments {
  R count, mean, m2;
};

template <typename R> KT_DEVICE Moments<R> merge(Moments<R> a, Moments<R> b) {
  R count = a.count + b.count;
  if (count == R(0)) return a;
  R share = b.count / count, delta = b.mean - a.mean;
  return Moments<R>{count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// The moments of a warp, in lane 0 only; all 32 lanes must call it.
template <typename R> KT_DEVICE Moments<R> warp_merge(Moments<R> m) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    Moments<R> other;
    other.count = __shfl_down_sync(KT_WARP, m.count, offset);
    other.mean = __shfl_down_sync(KT_WARP, m.mean, offset);
    other.m2 = __shfl_down_sync(KT_WARP, m.m2, offset);
    m = merge(m, other);
  }
  return m;
}

// The moments of a block of whole warps, the same bits in every thread: each warp's in R, then those of the warps in
// float64, in their order. `scratch` holds 32; it may be used again after the next barrier of the block.
template <typename R> KT_DEVICE Moments<double> block_merge(Moments<R> m, Moments<double>* scratch) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int warps = blockDim.x * blockDim.y * blockDim.z / 32;
  m = warp_merge(m);
  if (thread % 32 == 0) scratch[thread / 32] = Moments<double>{(double)m.count, (double)m.mean, (double)m.m2};
  __syncthreads();
  Moments<double> all = scratch[0];
  for (int w = 1; w < warps; ++w) all = merge(all, scratch[w]);
  return all;
}

// Whether this block is the last of `blocks` that come here; it then sees what the others wrote before they came. All
// threads call it, once in a launch. `ticket` was zero before the kernel's first launch ever, and is zero again after each.
KT_DEVICE bool kt_last_block(unsigned* ticket, int blocks) {
  KT_SHARED(int, last, 1);
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    __threadfence();
    last[0] = atomicAdd(ticket, 1u) == (unsigned)blocks - 1;
    if (last[0]) *ticket = 0;
    __threadfence();
  }
  __syncthreads();
  return last[0] != 0;
}

// --------------------------------------------------------------------------- clusters and cooperative grids

#ifdef KT_CPU_SIM
KT_DEVICE unsigned kt_acquire(const unsigned* word) { return *static_cast<const volatile unsigned*>(word); }
#else
KT_DEVICE void kt_pause() {}
KT_DEVICE unsigned kt_acquire(const unsigned* word) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
#endif

// A barrier of `members` blocks of a cooperative launch, the `round`-th that they meet at: 1, 2, ... `word` was zero before
// the first of them.
KT_DEVICE void kt_group_sync(unsigned* word, unsigned members, unsigned round) {
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    __threadfence();
    atomicAdd(word, 1u);
    while (kt_acquire(word) < members * round) kt_pause();
    __threadfence();
  }
  __syncthreads();
}

#ifndef KT_CPU_SIM
// A barrier of all blocks of a cooperative launch: `counter` was zero before the kernel's first launch ever, and counts on.
KT_DEVICE void kt_grid_sync(unsigned* counter) {
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    unsigned blocks = gridDim.x * gridDim.y * gridDim.z, before, now;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    unsigned goal = (before / blocks + 1) * blocks;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while ((int)(now - goal) < 0);
  }
  __syncthreads();
}

#if __CUDA_ARCH__ >= 900
KT_DEVICE unsigned kt_cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
KT_DEVICE void kt_cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What block `rank` of the cluster holds where this block's shared memory has p.
KT_DEVICE double kt_peer(const double* p, unsigned rank) {
  unsigned own = (unsigned)__cvta_generic_to_shared(p), there;
  double value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(rank));
  asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(value) : "r"(there) : "memory");
  return value;
}
#endif
#endif
