// Which of the items of a block, or of several, are those of a thread.
#ifndef JAXNSA_CUDA_THREAD_ITEMS_CUH_
#define JAXNSA_CUDA_THREAD_ITEMS_CUH_

#include <cstdint>

#include "parameters.cuh"

namespace jaxnsa {

// Of `count` items, those that are this thread's: neighbours, and as many as any other thread's.
struct ThreadItems {
  int32_t size;  // of the first thread's, than which none is larger
  int32_t first;
  int32_t end;

  __device__ explicit ThreadItems(int32_t count) {
    size = static_cast<int32_t>(CeilDiv(count, kThreads));
    const int64_t begin = int64_t{threadIdx.x} * size;
    first = begin < count ? static_cast<int32_t>(begin) : count;
    end = first + Min(size, count - first);
  }
};

// Every `step`th row from `first` on, in each thread others.
struct Stride {
  int64_t first;
  int64_t step;

  __device__ Stride(int32_t share, int32_t shares)
      : first(int64_t{share} * kThreads + threadIdx.x), step(int64_t{shares} * kThreads) {}
};

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_THREAD_ITEMS_CUH_
