// A thread block on the CPU: every CUDA thread is a fiber, and one loop switches between them in changing orders.
//
// Warp-wide instructions meet in `collective`, which aborts where the lanes of a warp are not at the same one. Copies of the copy engine
// land a random number of rounds after they were issued, and until then their target holds NaN; warps are stopped at random. So a
// missing wait, or a buffer that is written too early, shows as a wrong result, a hang or an abort.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

namespace emulator {

constexpr int kMostThreads = 512;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
};
struct Exchange {
  uint32_t words[8];
};
struct Warp {
  Exchange arriving[32], complete[32];
  int count;
  uint64_t generation;
  int instruction;
};
struct Barrier {  // an mbarrier
  int expected, pending;
  int64_t bytes;
  uint32_t phase;
};
struct Copy {
  std::function<void()> land;
  int rounds;
};

inline std::vector<Fiber> fibers(kMostThreads);
inline Warp warps[kMostThreads / 32];
inline std::map<void*, Barrier> barriers;
inline std::vector<Copy> copies;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline uint8_t* shared_memory;
inline int current, threads, synced;
inline uint64_t sync_generation;
inline uint32_t state = 1;
struct Index {
  unsigned x;
};
inline Index block, grid;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "thread block %u, thread %d: %s\n", block.x, current, what);
  exit(2);
}
inline uint32_t random() {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}
inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

// All lanes of the warp come here with the same `instruction`; each gets what every lane brought.
inline const Exchange* collective(int instruction, const Exchange& mine) {
  Warp& warp = warps[current / 32];
  if (warp.count == 0) warp.instruction = instruction;
  if (warp.instruction != instruction) fail("the lanes of a warp are at different warp-wide instructions");
  warp.arriving[current % 32] = mine;
  const uint64_t generation = warp.generation;
  if (++warp.count == 32) {
    memcpy(warp.complete, warp.arriving, sizeof warp.arriving);
    warp.count = 0;
    ++warp.generation;
  } else {
    while (warp.generation == generation) yield();
  }
  return warp.complete;
}

inline void sync_threads() {
  const uint64_t generation = sync_generation;
  if (++synced == threads) {
    synced = 0;
    ++sync_generation;
  } else {
    while (sync_generation == generation) yield();
  }
}

inline Barrier& barrier(void* at) {
  const auto found = barriers.find(at);
  if (found == barriers.end()) fail("a barrier is used before it is initialised");
  return found->second;
}
inline void complete_phase(Barrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.phase ^= 1;
  b.pending = b.expected;
}
inline void arrive(void* at) {
  Barrier& b = barrier(at);
  if (--b.pending < 0) fail("more arrivals at a barrier than it expects");
  complete_phase(b);
}

inline void enter() {
  body();
  fibers[current].done = true;
  yield();
}

inline void run_block(unsigned index, int count, std::function<void()> kernel) {
  block.x = index;
  threads = count;
  body = std::move(kernel);
  synced = 0;
  barriers.clear();
  copies.clear();
  memset(warps, 0, sizeof warps);
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    fiber.stack.resize(256 << 10);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  int stopped = -1;  // a warp that stands still for a while
  for (int left = count, round = 0; left > 0; ++round) {
    if (round == 300000) fail("hangs");
    if (random() % 64 == 0) stopped = random() % (count / 32 + 2);
    const int first = random() % count;
    for (int i = 0; i < count; ++i) {
      current = (first + i) % count;
      if (current / 32 != stopped && !fibers[current].done) swapcontext(&scheduler, &fibers[current].context);
    }
    left = 0;
    for (int i = 0; i < count; ++i) left += !fibers[i].done;
    for (size_t i = 0; i < copies.size();) {
      if (copies[i].rounds-- > 0) {
        ++i;
      } else {
        copies[i].land();
        copies.erase(copies.begin() + i);
      }
    }
  }
  if (!copies.empty()) fail("ends with copies under way");
}

}  // namespace emulator
