#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda_runtime_api.h"

namespace cuda_simulator {
namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned kMaxThreads = 1024;

// A thread of the GPU: a stack, and where it goes on.
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool runs = false;
};

struct Multiprocessor {
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  ucontext_t scheduler;
  Fiber* current = nullptr;
  const std::function<void()>* kernel = nullptr;
};

Multiprocessor& Here() {
  static thread_local Multiprocessor here;
  return here;
}

void Start() {
  Multiprocessor& here = Here();
  (*here.kernel)();
  here.current->runs = false;
  swapcontext(&here.current->context, &here.scheduler);
}

void Prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.runs = true;
  makecontext(&fiber.context, Start, 0);
}

void RunBlock(Multiprocessor& here) {
  for (unsigned k = 0; k < blockDim.x; ++k) Prepare(here.fibers[k]);
  bool runs = true;
  for (bool forwards = true; runs; forwards = !forwards) {
    runs = false;
    for (unsigned k = 0; k < blockDim.x; ++k) {
      threadIdx.x = forwards ? k : blockDim.x - 1 - k;
      here.current = &here.fibers[threadIdx.x];
      if (!here.current->runs) continue;
      swapcontext(&here.scheduler, &here.current->context);
      runs = runs || here.current->runs;
    }
  }
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

void Synchronize() {
  Multiprocessor& here = Here();
  swapcontext(&here.current->context, &here.scheduler);
}

void RequireAligned(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes == 0) return;
  std::fprintf(stderr, "misaligned access of %zu bytes at %p\n", bytes, pointer);
  std::abort();
}

}  // namespace cuda_simulator
