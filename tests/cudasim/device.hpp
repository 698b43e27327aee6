// The simulator's side of a launch: what threads, barriers, warp operations and shared memory are made of.
#pragma once
#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

namespace sim {

// Shared memory of a block, as on sm_90: static arrays, then the dynamic part. Nobody writes the gaps behind each.
constexpr size_t MOST_STATIC = 48 << 10, GAP = 128, STATIC_SHARED = MOST_STATIC + 64 * GAP;
constexpr size_t DYNAMIC_SHARED = 227 << 10, SHARED = STATIC_SHARED + DYNAMIC_SHARED + GAP;

// A static array in shared memory; those of a module are a list, from the last to the first.
struct Slot {
  size_t offset, bytes;
  const Slot* before;
};

struct Launch {
  uint3 grid, block;
  size_t dynamic;   // bytes of dynamic shared memory
  // 0: threads and blocks in their order, 1: reversed, above: at random, anew in every round. Where it is even, each
  // thread has a turn in a round; where it is odd, warps and blocks go on as far as they come before the next one's turn.
  uint64_t order;
  unsigned wave;    // consecutive blocks that are resident together: 1, a cluster's size, or the whole grid
  unsigned kept;    // after so many waves, `skipped` others do not run
  size_t skipped;
};

struct Thread {
  uint3 thread, block;
  unsigned rank;          // of the block in its wave
  unsigned lane, warp;    // in the block
  unsigned char* shared;  // of the block
};

// Of the running thread.
extern Thread* current;
extern uint3 block_dim, grid_dim;

// `site` is the place in the source text. Each returns when the others have arrived.
void block_barrier(const char* site);
void wave_barrier(const char* site);
void grid_barrier(const char* site);  // of a launch whose blocks are all resident
// The lanes in `mask` meet; `value` is what each brings, at most 16 bytes.
void warp_meet(const char* site, int operation, unsigned mask, const void* value, size_t bytes);
// What a lane brought to the last meeting of the warp.
const void* warp_value(const char* site, unsigned mask, unsigned lane);
unsigned char* peer_shared(unsigned rank);
void slot_found(const Slot& slot);  // while a launch runs
void pause();
[[noreturn]] void fail(const char* format, ...);

// Runs body(argument) in every thread; 0, or 1 with a message of at most 512 bytes. `slots` are those that are known.
int run(const Launch& launch, void (*body)(void*), void* argument, const Slot* const& slots, char* message);

}  // namespace sim
