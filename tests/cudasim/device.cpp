// Threads are fibers of one thread of the system: each runs until it waits or ends, in an order that the launch chooses.
#include "device.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#error "the switch of stacks is written for x86-64"
#endif

// Saves the callee's registers and the stack of one fiber, and goes on with another's.
extern "C" void sim_switch(void** save, void* load);
asm(R"(.text
.globl sim_switch
.type sim_switch,@function
sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size sim_switch,.-sim_switch
)");

namespace sim {

Thread* current;
uint3 block_dim, grid_dim;

namespace {

enum State { READY, AT_BLOCK, AT_WARP, AT_WAVE, DONE };
constexpr size_t STACK = 64 << 10, PAGE = 4096, MESSAGE = 512, LANES = 32;
constexpr long PATIENCE = 100000;  // rounds in which threads only pause

struct Fiber : Thread {
  char* stack;
  void* pointer;    // into the stack, while it does not run
  void* fake;       // the sanitizer's own
  unsigned number;  // in the block
  State state;
  const char* site;
  unsigned mask;
  int operation;
};

struct alignas(16) Cell {
  unsigned char bytes[16];
};

struct Warp {
  Cell brought[LANES], met[LANES];
};

struct {
  std::vector<Fiber> fibers;      // of the resident blocks, one block after the other
  std::vector<Warp> warps;        // likewise
  std::vector<unsigned> turns;    // the order of the fibers
  std::vector<unsigned char*> memory;  // shared memory of each resident block
  unsigned threads, blocks;       // of a block; of a wave
  void (*body)(void*);
  void* argument;
  const Slot* const* slots;       // of the module
  void* pointer;                  // of the scheduler's own stack
  void* fake;
  const void* bottom;
  size_t size;
  uint64_t random;
  bool failed, moved;
  char message[MESSAGE];
} now;

Fiber& me() { return *static_cast<Fiber*>(current); }
unsigned warps_of_block() { return (now.threads + LANES - 1) / LANES; }
Warp& my_warp() { return now.warps[me().rank * warps_of_block() + me().warp]; }

void note(const char* format, ...) {
  if (now.failed) return;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(now.message, MESSAGE, format, arguments);
  va_end(arguments);
  now.failed = true;
}

bool same(const char* one, const char* other) { return one == other || !strcmp(one, other); }

void to_scheduler() {
  Fiber& fiber = me();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fiber.state == DONE ? nullptr : &fiber.fake, now.bottom, now.size);
#endif
  sim_switch(&fiber.pointer, now.pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber.fake, &now.bottom, &now.size);
#endif
}

void to_fiber(Fiber& fiber) {
  current = &fiber;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&now.fake, fiber.stack, STACK);
#endif
  sim_switch(&now.pointer, fiber.pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(now.fake, nullptr, nullptr);
#endif
}

void enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &now.bottom, &now.size);
#endif
  now.body(now.argument);
  me().state = DONE;
  to_scheduler();
  abort();
}

void wait(State state, const char* site) {
  me().state = state;
  me().site = site;
  to_scheduler();
}

uint64_t random_number() {
  now.random ^= now.random << 13;
  now.random ^= now.random >> 7;
  return now.random ^= now.random << 17;
}

template <typename T> void arrange(std::vector<T>& turns, uint64_t order) {
  if (order == 1) {
    if (turns.size() > 1 && turns[0] < turns[1]) std::reverse(turns.begin(), turns.end());
  } else if (order) {
    for (size_t i = turns.size(); i > 1; --i) std::swap(turns[i - 1], turns[random_number() % i]);
  }
}

bool make_room(unsigned fibers, unsigned blocks) {
  while (now.fibers.size() < fibers) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, PAGE, PROT_NONE)) return false;
    now.fibers.emplace_back();
    now.fibers.back().stack = static_cast<char*>(memory) + PAGE;
  }
  while (now.memory.size() < blocks) {
    now.memory.push_back(static_cast<unsigned char*>(aligned_alloc(128, SHARED)));
    if (!now.memory.back()) return false;
  }
  now.warps.resize(size_t(blocks) * warps_of_block());
  return true;
}

// The stack of a fiber that has not begun: `enter` follows as if it had been called.
void prepare(Fiber& fiber) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(fiber.stack, STACK);
#endif
  void** top = reinterpret_cast<void**>(fiber.stack + STACK);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(enter);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.pointer = top;
  fiber.fake = nullptr;
  fiber.state = READY;
}

// What memory holds before it is written: NaN, or a number, so that whoever reads it has other bits in other orders.
unsigned char undefined(const Launch& launch) { return launch.order % 2 ? 0x5A : 0xFF; }

// Calls use(from, size) for all shared memory that belongs to no array.
template <typename F> void each_gap(const Launch& launch, const F& use) {
  size_t end = STATIC_SHARED;
  for (const Slot* s = *now.slots; s; end = s->offset, s = s->before) use(s->offset + s->bytes, end - s->offset - s->bytes);
  use(0, end);
  use(STATIC_SHARED + launch.dynamic, GAP);
}

void start_block(const Launch& launch, unsigned slot, size_t block) {
  unsigned char* shared = now.memory[slot];
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(shared, SHARED);
#endif
  memset(shared, undefined(launch), STATIC_SHARED + launch.dynamic + GAP);
#ifdef __SANITIZE_ADDRESS__
  each_gap(launch, [&](size_t from, size_t size) { __asan_poison_memory_region(shared + from, size); });
#endif
  const uint3 b = launch.block, g = launch.grid;
  for (unsigned i = 0; i < now.threads; ++i) {
    Fiber& fiber = now.fibers[slot * now.threads + i];
    fiber.thread = {i % b.x, i / b.x % b.y, i / (b.x * b.y)};
    fiber.block = {unsigned(block % g.x), unsigned(block / g.x % g.y), unsigned(block / g.x / g.y)};
    fiber.rank = slot;
    fiber.lane = i % LANES;
    fiber.warp = i / LANES;
    fiber.number = i;
    fiber.shared = shared;
    prepare(fiber);
  }
}

// Looks whether shared memory was written beyond its arrays.
void check_gaps(const Launch& launch, unsigned slot) {
  unsigned char* shared = now.memory[slot];
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(shared, SHARED);
#endif
  each_gap(launch, [&](size_t from, size_t size) {
    if (size && (shared[from] != undefined(launch) || memcmp(shared + from, shared + from + 1, size - 1)))
      note("shared memory is written beyond its arrays");
  });
}

// Releases a block whose threads all stand at one barrier. Stricter than the hardware: none may have ended before.
void release_block(unsigned slot) {
  Fiber* first = &now.fibers[slot * now.threads];
  unsigned waiting = 0, done = 0;
  const char* site = nullptr;
  for (Fiber* f = first; f < first + now.threads; ++f) {
    done += f->state == DONE;
    if (f->state != AT_BLOCK) continue;
    if (site && !same(site, f->site)) return note("threads wait at two barriers, %s and %s", site, f->site);
    site = f->site;
    ++waiting;
  }
  if (!waiting || waiting + done < now.threads) return;
  if (done) return note("%s: a barrier after %u threads of the block have ended", site, done);
  for (Fiber* f = first; f < first + now.threads; ++f) f->state = READY;
  now.moved = true;
}

// Releases the wave when all its threads stand at one barrier; says whether all have ended.
bool release_wave() {
  unsigned waiting = 0, done = 0, all = now.threads * now.blocks;
  const char* site = nullptr;
  for (unsigned i = 0; i < all; ++i) {
    Fiber& f = now.fibers[i];
    done += f.state == DONE;
    if (f.state != AT_WAVE) continue;
    if (site && !same(site, f.site)) return note("threads wait at two wide barriers, %s and %s", site, f.site), false;
    site = f.site;
    ++waiting;
  }
  if (waiting && waiting + done == all) {
    if (done) return note("%s: a wide barrier after %u threads have ended", site, done), false;
    for (unsigned i = 0; i < all; ++i) now.fibers[i].state = READY;
    now.moved = true;
  }
  return done == all;
}

void report_deadlock() {
  for (unsigned i = 0; i < now.threads * now.blocks; ++i) {
    Fiber& f = now.fibers[i];
    if (f.state != DONE && f.state != READY)
      return note("deadlock: thread %u waits at %s for others that never come", f.number, f.site);
  }
  note("deadlock: threads wait in a loop for others that never come");
}

// Runs the ready ones of some threads, each until it waits.
void run_threads(const Launch& launch, unsigned first, unsigned end) {
  now.turns.resize(end - first);
  for (unsigned i = first; i < end; ++i) now.turns[i - first] = i;
  arrange(now.turns, launch.order);
  for (unsigned turn : now.turns) {
    if (now.fibers[turn].state == READY) to_fiber(now.fibers[turn]);
    if (now.failed) return;
  }
}

std::vector<unsigned> arranged(unsigned count, uint64_t order) {
  std::vector<unsigned> found(count);
  for (unsigned i = 0; i < count; ++i) found[i] = i;
  arrange(found, order);
  return found;
}

// Runs a block as far as it comes without others, and each of its warps as far as it comes before the next one.
void run_block(const Launch& launch, unsigned slot) {
  const unsigned begin = slot * now.threads;
  for (bool moved = true; moved && !now.failed;) {
    moved = false;
    for (unsigned w : arranged(warps_of_block(), launch.order)) {
      do {
        now.moved = false;
        run_threads(launch, begin + w * LANES, begin + std::min<unsigned>(now.threads, (w + 1) * LANES));
        moved |= now.moved;
      } while (now.moved && !now.failed);
    }
    now.moved = false;
    if (!now.failed) release_block(slot);
    moved |= now.moved;
  }
}

void run_wave(const Launch& launch, size_t first) {
  for (unsigned slot = 0; slot < now.blocks; ++slot) start_block(launch, slot, first + slot);
  for (long patience = PATIENCE; !now.failed;) {
    if (launch.order % 2) {
      for (unsigned slot : arranged(now.blocks, launch.order))
        if (!now.failed) run_block(launch, slot);
    }
    now.moved = false;
    if (launch.order % 2 == 0) run_threads(launch, 0, now.threads * now.blocks);
    for (unsigned slot = 0; slot < now.blocks && !now.failed; ++slot) release_block(slot);
    if (now.failed || release_wave()) break;
    if (now.moved) patience = PATIENCE;
    bool ready = std::any_of(now.fibers.begin(), now.fibers.begin() + now.threads * now.blocks,
                             [](const Fiber& f) { return f.state == READY; });
    if (!ready || !--patience) report_deadlock();
  }
  for (unsigned slot = 0; slot < now.blocks && !now.failed; ++slot) check_gaps(launch, slot);
  if (now.failed) {
    size_t used = strlen(now.message);
    const uint3& b = now.fibers[0].block;
    snprintf(now.message + used, MESSAGE - used, " [block %u,%u,%u]", b.x, b.y, b.z);
  }
}

bool valid(const Launch& launch, size_t blocks) {
  const uint3 g = launch.grid;
  size_t threads = size_t(launch.block.x) * launch.block.y * launch.block.z;
  if (!threads || threads > 1024) note("a block of %zu threads", threads);
  if (!blocks || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) note("a grid of %u x %u x %u", g.x, g.y, g.z);
  if (launch.dynamic > DYNAMIC_SHARED) note("%zu bytes of dynamic shared memory", launch.dynamic);
  if (!launch.wave || (blocks && blocks % launch.wave)) note("%zu blocks in waves of %u", blocks, launch.wave);
  return !now.failed;
}

}  // namespace

void fail(const char* format, ...) {
  char text[MESSAGE];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, MESSAGE, format, arguments);
  va_end(arguments);
  note("%s", text);
  for (;;) to_scheduler();  // which never comes back
}

void block_barrier(const char* site) { wait(AT_BLOCK, site); }
void wave_barrier(const char* site) { wait(AT_WAVE, site); }
void grid_barrier(const char* site) {
  if (now.blocks != size_t(grid_dim.x) * grid_dim.y * grid_dim.z) fail("%s: a barrier of a grid that is not resident", site);
  wave_barrier(site);
}
void pause() { to_scheduler(); }

void warp_meet(const char* site, int operation, unsigned mask, const void* value, size_t bytes) {
  Fiber& self = me();
  Fiber* lanes = &now.fibers[self.rank * now.threads + self.warp * LANES];
  unsigned count = std::min<unsigned>(LANES, now.threads - self.warp * LANES);
  if (!(mask >> self.lane & 1)) fail("%s: thread %u is not in its own mask %08x", site, self.number, mask);
  if (count < LANES && mask >> count) fail("%s: mask %08x names lanes beyond the block's %u threads", site, mask, now.threads);
  if (bytes) memcpy(my_warp().brought[self.lane].bytes, value, bytes);
  self.state = AT_WARP;
  self.site = site;
  self.mask = mask;
  self.operation = operation;
  bool all = true;
  for (unsigned l = 0; l < count; ++l) {
    if (!(mask >> l & 1)) continue;
    const Fiber& other = lanes[l];
    if (other.state == DONE) fail("%s: mask %08x names lane %u, which has ended", site, mask, l);
    if (other.state != AT_WARP) all = false;
    else if (other.mask != mask || other.operation != operation || !same(other.site, site))
      fail("lanes of a warp meet at %s (mask %08x) and %s (mask %08x)", site, mask, other.site, other.mask);
  }
  if (!all) return to_scheduler();
  memcpy(my_warp().met, my_warp().brought, sizeof my_warp().met);
  for (unsigned l = 0; l < count; ++l)
    if (mask >> l & 1) lanes[l].state = READY;
  now.moved = true;
}

const void* warp_value(const char* site, unsigned mask, unsigned lane) {
  if (!(mask >> lane & 1)) fail("%s: lane %u is read, which mask %08x leaves out", site, lane, mask);
  return my_warp().met[lane].bytes;
}

void slot_found(const Slot& slot) {
#ifdef __SANITIZE_ADDRESS__
  for (unsigned i = 0; i < now.blocks; ++i) __asan_unpoison_memory_region(now.memory[i] + slot.offset, slot.bytes);
#else
  (void)slot;
#endif
}

unsigned char* peer_shared(unsigned rank) {
  bool lives = false;
  for (unsigned i = 0; rank < now.blocks && i < now.threads; ++i)
    lives |= now.fibers[rank * now.threads + i].state != DONE;
  if (!lives) fail("shared memory of block %u of the cluster is read, which is not there any more", rank);
  return now.memory[rank];
}

int run(const Launch& launch, void (*body)(void*), void* argument, const Slot* const& slots, char* message) {
  const size_t blocks = size_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  now.failed = false;
  if (valid(launch, blocks)) {
    now.threads = launch.block.x * launch.block.y * launch.block.z;
    now.blocks = launch.wave;
    now.body = body;
    now.argument = argument;
    now.slots = &slots;
    now.random = launch.order * 0x9E3779B97F4A7C15ull + 88172645463325252ull;
    block_dim = launch.block;
    grid_dim = launch.grid;
    if (!make_room(now.threads * now.blocks, now.blocks)) note("no memory for %u blocks", now.blocks);
    std::vector<size_t> waves(blocks / launch.wave - launch.skipped);
    for (size_t i = 0; i < waves.size(); ++i) waves[i] = i < launch.kept ? i : launch.skipped + i;
    arrange(waves, launch.order);
    for (size_t wave : waves) {
      if (now.failed) break;
      run_wave(launch, wave * launch.wave);
    }
  }
  if (now.failed) snprintf(message, MESSAGE, "%s", now.message);
  return now.failed;
}

}  // namespace sim
