// How kernels are launched, and what they share.
#ifndef JAXNSA_CUDA_LAUNCH_H_
#define JAXNSA_CUDA_LAUNCH_H_

#include <cstdint>
#include <string>

#include "cuda.h"

namespace jaxnsa {

JAXNSA_HOST_DEVICE int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether four int32 can be moved at once from or to here.
JAXNSA_HOST_DEVICE bool IsAligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// What went wrong in a call about a kernel, or "".
inline std::string ErrorOf(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // or the next caller of CUDA would find it
  return std::string("kernel ") + kernel + ": " + cudaGetErrorString(error);
}

// Launches a kernel.
template <typename... Parameters>
std::string Launch(const char* name, cudaStream_t stream, void (*kernel)(Parameters...),
                   dim3 grid, int threads, const Parameters&... parameters) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  return ErrorOf(name, cudaLaunchKernelEx(&config, kernel, parameters...));
}

// Loads kernels on the current device, which the first launch of each would do otherwise.
template <typename... Kernels>
std::string LoadKernels(const char* name, Kernels... kernels) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaSuccess;
  for (const void* kernel : {reinterpret_cast<const void*>(kernels)...}) {
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  }
  return ErrorOf(name, error);
}

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_LAUNCH_H_
