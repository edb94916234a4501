#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime_api.h"

namespace cuda_simulator {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kMaxThreads = 1024, kWarpThreads = 32;

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kReturned };

// Where a stack goes on, for __builtin_setjmp: swapcontext takes a system call each time.
using Place = void*[5];

// A thread of the GPU: a stack, null before there was one, and where it goes on.
struct Fiber {
  std::unique_ptr<char[]> stack;
  Place place;
  State state = State::kReturned;
  uint32_t given = 0;  // to its warp
};

struct Multiprocessor {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  Place scheduler;
  Fiber* current = nullptr;
  const std::function<void()>* kernel = nullptr;
};

Multiprocessor& Here() {
  static thread_local Multiprocessor here;
  return here;
}

// A sanitizer would take a jump for the end of the stack that it leaves, and a caller that sees into
// these functions would leave values in registers that another thread overwrites.
[[gnu::noipa, gnu::no_sanitize_address]] void Jump(Place to) { __builtin_longjmp(to, 1); }

[[gnu::noipa, gnu::no_sanitize_address]] void Switch(Place from, Place to) {
  if (__builtin_setjmp(from) == 0) Jump(to);
}

// A thread's life: it runs the kernel for one block after the other.
void RunThread() {
  Multiprocessor& here = Here();
  for (;;) {
    (*here.kernel)();
    here.current->state = State::kReturned;
    Switch(here.current->place, here.scheduler);
  }
}

[[gnu::noipa, gnu::no_sanitize_address]] void Begin(Place from, const ucontext_t& thread) {
  if (__builtin_setjmp(from) == 0) setcontext(&thread);
}

// Lets the current thread go on until it waits or returns.
void Resume(Multiprocessor& here) {
  Fiber& fiber = *here.current;
  if (fiber.stack != nullptr) {
    Switch(here.scheduler, fiber.place);
    return;
  }
  fiber.stack.reset(new char[kStackBytes]);
  ucontext_t thread;
  getcontext(&thread);
  thread.uc_stack.ss_sp = fiber.stack.get();
  thread.uc_stack.ss_size = kStackBytes;
  makecontext(&thread, RunThread, 0);
  Begin(here.scheduler, thread);
}

// Lets threads go on that all wait at the same barrier; false where they wait at another, or none
// is left.
bool Release(Multiprocessor& here, unsigned begin, unsigned end, State barrier) {
  bool waits = false;
  for (unsigned k = begin; k < end; ++k) {
    const State state = here.fibers[k].state;
    if (state != barrier && state != State::kReturned) return false;
    waits = waits || state == barrier;
  }
  for (unsigned k = begin; k < end && waits; ++k) {
    if (here.fibers[k].state == barrier) here.fibers[k].state = State::kReady;
  }
  return waits;
}

void RunBlock(Multiprocessor& here) {
  const unsigned threads = blockDim.x;
  for (unsigned k = 0; k < threads; ++k) here.fibers[k].state = State::kReady;
  for (bool forwards = true, runs = true; runs; forwards = !forwards) {
    for (unsigned k = 0; k < threads; ++k) {
      threadIdx.x = forwards ? k : threads - 1 - k;
      here.current = &here.fibers[threadIdx.x];
      if (here.current->state != State::kReady) continue;
      Resume(here);
    }
    runs = Release(here, 0, threads, State::kAtBlockBarrier);
    for (unsigned k = 0; k < threads; k += kWarpThreads) {
      const unsigned end = k + kWarpThreads < threads ? k + kWarpThreads : threads;
      runs = Release(here, k, end, State::kAtWarpBarrier) || runs;
    }
  }
  for (unsigned k = 0; k < threads; ++k) {
    if (here.fibers[k].state == State::kReturned) continue;
    std::fprintf(stderr, "threads of a block wait at different barriers\n");
    std::abort();
  }
}

void Wait(State barrier) {
  Multiprocessor& here = Here();
  here.current->state = barrier;
  Switch(here.current->place, here.scheduler);
}

}  // namespace

bool Run(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  if (grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 || grid.z == 0 ||
      grid.z > 65535 || block.x == 0 || block.x > kMaxThreads) {
    return false;
  }
  Multiprocessor& here = Here();
  here.kernel = &kernel;
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) RunBlock(here);
    }
  }
  return true;
}

void Synchronize() { Wait(State::kAtBlockBarrier); }

std::array<uint32_t, 32> Exchange(uint32_t given) {
  Multiprocessor& here = Here();
  here.current->given = given;
  Wait(State::kAtWarpBarrier);
  std::array<uint32_t, kWarpThreads> all;
  const unsigned first = threadIdx.x / kWarpThreads * kWarpThreads;
  for (unsigned k = 0; k < kWarpThreads; ++k) all[k] = here.fibers[first + k].given;
  Wait(State::kAtWarpBarrier);  // nobody gives anew before all have read
  return all;
}

void RequireAligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes == 0) return;
  std::fprintf(stderr, "misaligned access of %zu bytes at %p\n", bytes, pointer);
  std::abort();
}

}  // namespace cuda_simulator
