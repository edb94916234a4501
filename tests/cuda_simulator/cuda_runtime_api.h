// A GPU for tests: CUDA kernels compiled as C++ and run on the CPU, one block after the other. The
// threads of a block take turns on one stack each, from one barrier to the next, forwards and
// backwards by turns so that a missing barrier shows. Only what the kernels use exists.
#ifndef JAXNSA_CUDA_SIMULATOR_H_
#define JAXNSA_CUDA_SIMULATOR_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x) : x(x) {}
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

struct alignas(16) int4 {
  int32_t x, y, z, w;
};

// Of the thread that runs.
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_simulator {

// Runs `kernel` for every thread of a grid; false where the GPU would refuse the grid.
bool Run(dim3 grid, dim3 block, const std::function<void()>& kernel);

// Waits for the other threads of the block that have not returned.
void Synchronize();

// Waits for the other threads of the warp, and returns what each of them gave.
std::array<uint32_t, 32> Exchange(uint32_t given);

// What every access of a GPU needs; a violation ends the process with a message.
void RequireAligned(const void* pointer, size_t bytes);

}  // namespace cuda_simulator

inline void __syncthreads() { cuda_simulator::Synchronize(); }

// A block's threads take turns on one of the host's.
inline int __syncthreads_or(int condition) {
  thread_local int any;
  __syncthreads();
  any = 0;
  __syncthreads();
  any |= condition;
  __syncthreads();
  return any;
}

// Of all threads of a warp: other masks are not needed.
inline uint32_t __ballot_sync(uint32_t, bool condition) {
  const auto given = cuda_simulator::Exchange(condition);
  uint32_t ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= given[lane] << lane;
  return ballot;
}
inline int32_t __shfl_sync(uint32_t, int32_t value, int lane) {
  return static_cast<int32_t>(cuda_simulator::Exchange(static_cast<uint32_t>(value))[lane]);
}
inline uint32_t __reduce_add_sync(uint32_t, uint32_t value) {
  uint32_t sum = 0;
  for (const uint32_t given : cuda_simulator::Exchange(value)) sum += given;
  return sum;
}

inline int __clz(int32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }

inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }

template <typename T>
T __ldg(const T* source) {
  cuda_simulator::RequireAligned(source, sizeof(T));
  return *source;
}

template <typename T>
T __ldcg(const T* source) {
  return __ldg(source);
}

template <typename T>
void __stcs(T* destination, T value) {
  cuda_simulator::RequireAligned(destination, sizeof(T));
  *destination = value;
}

template <typename T>
void __stcg(T* destination, T value) {
  __stcs(destination, value);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const bool ran =
      cuda_simulator::Run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return ran ? cudaSuccess : cudaErrorInvalidConfiguration;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }

#endif  // JAXNSA_CUDA_SIMULATOR_H_
