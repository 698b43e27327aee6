// The part of CUDA's device language that the kernels use, for a compiler of the CPU; included before a kernel's text.
#pragma once
#define KT_CPU_SIM 1
#include <cmath>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#include "device.hpp"

#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define KT_KERNEL(...) static void
#define KT_CLUSTER(size)
#define KT_SHARED(T, name, count)                                          \
  static const sim::Held name##_slot(sizeof(T) * (count), alignof(T));     \
  T* const name = reinterpret_cast<T*>(sim::current->shared + name##_slot.offset)
#define KT_DYN_SHARED(T, name) T* const name = reinterpret_cast<T*>(sim::current->shared + sim::STATIC_SHARED)

#define threadIdx (sim::current->thread)
#define blockIdx (sim::current->block)
#define blockDim (sim::block_dim)
#define gridDim (sim::grid_dim)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) int2 {
  int x, y;
};

namespace sim {

static const Slot* slots;  // of this module

struct Held : Slot {
  Held(size_t size, size_t alignment) : Slot{0, size, slots} {
    static size_t used;
    used += size;
    if (used > MOST_STATIC) fail("%zu bytes of static shared memory", used);
    const size_t end = before ? before->offset + before->bytes : 0;
    offset = (end + GAP + alignment - 1) / alignment * alignment;
    slots = this;
    slot_found(*this);
  }
};

enum Shuffle { XOR, DOWN, UP, FROM, BALLOT, MEET };

template <typename T> T shuffle(const char* site, Shuffle kind, unsigned mask, T value, int argument, int width = 32) {
  static_assert(sizeof(T) <= 16, "a lane brings at most 16 bytes");
  warp_meet(site, kind, mask, &value, sizeof value);
  int lane = current->lane, first = lane & ~(width - 1), end = first + width, source = lane;
  if (kind == XOR) source = lane ^ argument;
  if (kind == DOWN) source = lane + argument;
  if (kind == UP) source = lane - argument;
  if (kind == FROM) source = first + (argument & (width - 1));
  if (source < first || source >= end) source = lane;
  T result;
  memcpy(&result, warp_value(site, mask, source), sizeof result);
  return result;
}

inline unsigned mask_of(unsigned mask = 0xffffffffu) { return mask; }

inline unsigned ballot(const char* site, unsigned mask, int predicate) {
  warp_meet(site, BALLOT, mask, &predicate, sizeof predicate);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    int value = 0;
    if (mask >> lane & 1) memcpy(&value, warp_value(site, mask, lane), sizeof value);
    bits |= unsigned(value != 0) << lane;
  }
  return bits;
}

}  // namespace sim

#define SIM_TEXT_(x) #x
#define SIM_TEXT(x) SIM_TEXT_(x)
#define SIM_SITE (__FILE__ ":" SIM_TEXT(__LINE__))
#define __syncthreads() sim::block_barrier(SIM_SITE)
#define __syncwarp(...) sim::warp_meet(SIM_SITE, sim::MEET, sim::mask_of(__VA_ARGS__), nullptr, 0)
#define __shfl_xor_sync(mask, x, ...) sim::shuffle(SIM_SITE, sim::XOR, mask, x, __VA_ARGS__)
#define __shfl_down_sync(mask, x, ...) sim::shuffle(SIM_SITE, sim::DOWN, mask, x, __VA_ARGS__)
#define __shfl_up_sync(mask, x, ...) sim::shuffle(SIM_SITE, sim::UP, mask, x, __VA_ARGS__)
#define __shfl_sync(mask, x, ...) sim::shuffle(SIM_SITE, sim::FROM, mask, x, __VA_ARGS__)
#define __ballot_sync(mask, x) sim::ballot(SIM_SITE, mask, x)
#define __any_sync(mask, x) (sim::ballot(SIM_SITE, mask, x) != 0)
#define __all_sync(mask, x) (sim::ballot(SIM_SITE, mask, !(x)) == 0)
#define __threadfence() ((void)0)
#define kt_grid_sync(counter) sim::grid_barrier(SIM_SITE)
#define kt_cluster_sync() sim::wave_barrier(SIM_SITE)
#define kt_cluster_rank() (sim::current->rank)
#define kt_pause() sim::pause()

template <typename T> T kt_peer(const T* p, unsigned rank) {
  T value;
  memcpy(&value, sim::peer_shared(rank) + (reinterpret_cast<const unsigned char*>(p) - sim::current->shared), sizeof value);
  return value;
}

template <typename T> T __ldg(const T* p) { return *p; }
template <typename T> T __ldcs(const T* p) { return *p; }
template <typename T> void __stcs(T* p, T x) { *p = x; }
template <typename T> void __stwb(T* p, T x) { *p = x; }

// Whole numbers only: the sum of floats by atomics depends on the order.
inline unsigned atomicAdd(unsigned* p, unsigned x) {
  unsigned before = *p;
  *p += x;
  return before;
}
inline unsigned atomicOr(unsigned* p, unsigned x) {
  unsigned before = *p;
  *p |= x;
  return before;
}
inline unsigned atomicMax(unsigned* p, unsigned x) {
  unsigned before = *p;
  *p = before > x ? before : x;
  return before;
}

template <typename To, typename From> To sim_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &x, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return sim_bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return sim_bits<float>(x); }
inline long long __double_as_longlong(double x) { return sim_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return sim_bits<double>(x); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
using std::isfinite;
using std::isnan;
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }

inline float half_to_float(unsigned short bits) { return (float)sim_bits<_Float16>(bits); }
inline unsigned short float_to_half(float x) { return sim_bits<unsigned short>((_Float16)x); }

// Names of the parameters' types, for the host: "float32*", "const uint32*", "int64", "struct 24".
struct half;
struct bfloat16;

namespace sim {

template <typename T> constexpr const char* name_of() {
  if constexpr (std::is_same_v<T, float>) return "float32";
  else if constexpr (std::is_same_v<T, double>) return "float64";
  else if constexpr (std::is_same_v<T, ::half>) return "float16";
  else if constexpr (std::is_same_v<T, ::bfloat16>) return "bfloat16";
  else if constexpr (std::is_same_v<T, int>) return "int32";
  else if constexpr (std::is_same_v<T, unsigned>) return "uint32";
  else if constexpr (std::is_same_v<T, long long>) return "int64";
  else if constexpr (std::is_same_v<T, unsigned long long>) return "uint64";
  else if constexpr (std::is_same_v<T, unsigned char>) return "uint8";
  else return "struct";
}

template <typename A> void append_type(char* text, size_t room) {
  size_t used = strlen(text);
  const char* comma = used ? ", " : "";
  if constexpr (std::is_pointer_v<A>) {
    typedef std::remove_pointer_t<A> E;
    const char* constant = std::is_const_v<E> ? "const " : "";
    snprintf(text + used, room - used, "%s%s%s*", comma, constant, name_of<std::remove_cv_t<E>>());
  } else if constexpr (std::is_class_v<A>) {
    snprintf(text + used, room - used, "%sstruct %zu", comma, sizeof(A));
  } else {
    snprintf(text + used, room - used, "%s%s", comma, name_of<A>());
  }
}

template <typename... A> const char* types_of(void (*)(A...)) {
  static char text[2048];
  text[0] = 0;
  (append_type<A>(text, sizeof text), ...);
  return text;
}

template <typename... A> struct Call {
  void (*kernel)(A...);
  void** arguments;
  template <size_t... I> void apply(std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
  }
  static void body(void* self) { static_cast<Call*>(self)->apply(std::index_sequence_for<A...>{}); }
};

template <typename... A> int call(void (*kernel)(A...), const Launch* launch, void** arguments, char* message) {
  Call<A...> with{kernel, arguments};
  return run(*launch, &Call<A...>::body, &with, slots, message);
}

}  // namespace sim

// The loader writes one for each kernel below the kernels' text.
#define SIM_EXPORT(kernel)                                                                                            \
  extern "C" __attribute__((visibility("default"))) int sim_##kernel(const sim::Launch* l, void** a, char* message) { \
    return sim::call(kernel, l, a, message);                                                                          \
  }                                                                                                                   \
  extern "C" __attribute__((visibility("default"))) const char* types_##kernel() { return sim::types_of(kernel); }
