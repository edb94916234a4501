// How kernels are launched and loaded, and what they share.
#ifndef JAXNSA_CUDA_LAUNCH_CUH_
#define JAXNSA_CUDA_LAUNCH_CUH_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "integers.h"

namespace jaxnsa {

// Whether four int32 can be moved at once from or to here.
JAXNSA_HOST_DEVICE bool IsAligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Throws what went wrong in a call about a kernel.
inline void Check(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next caller of CUDA would find it
  throw std::runtime_error(std::string("kernel ") + kernel + ": " + cudaGetErrorString(error));
}

// Launches a kernel on a stream, a cudaStream_t.
template <typename... Parameters>
void Launch(const char* name, void* stream, void (*kernel)(Parameters...), dim3 grid, int threads,
            const Parameters&... parameters) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  Check(name, cudaLaunchKernelEx(&config, kernel, parameters...));
}

// Loads kernels on the current device, which the first launch of each would do otherwise.
template <typename... Kernels>
void LoadKernels(const char* name, Kernels... kernels) {
  cudaFuncAttributes attributes;
  for (const void* kernel : {reinterpret_cast<const void*>(kernels)...}) {
    Check(name, cudaFuncGetAttributes(&attributes, kernel));
  }
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_LAUNCH_CUH_
