// The computations on an NVIDIA GPU: the platform of the handlers.
#ifndef JAXNSA_CUDA_H_
#define JAXNSA_CUDA_H_

#include <cuda_runtime_api.h>

#include <string>

#include "metadata.h"

namespace jaxnsa {

// Each function is one launch, but for the draft-extend variants that launch twice. They return an
// error message with the name of the kernel, empty for success.
struct Cuda {
  using Stream = cudaStream_t;

  static Stream StreamOf(void* stream) { return static_cast<Stream>(stream); }

  static bool IsCurrentDevice(int device) {
    int current;
    return cudaGetDevice(&current) == cudaSuccess && current == device;
  }

  static std::string PrefixSum(Stream stream, PrefixSumVariant variant, const int32_t* x, int64_t n,
                               int32_t* out);
  static std::string FillDraftExtend(Stream stream, DraftExtendVariant variant,
                                     const DraftExtend& args);
  static std::string CopyMetadata(Stream stream, const Copy& args);
  static std::string FusedMetadata(Stream stream, const Fused& args);

  // Load kernels on the current device, which the first launch of each would do otherwise.
  static std::string LoadFillDraftExtend();
  static std::string LoadCopyMetadata();
  static std::string LoadFusedMetadata();

  // Those of all functions that direct callers have.
  static std::string Load() {
    std::string error = LoadFillDraftExtend();
    if (error.empty()) error = LoadCopyMetadata();
    if (error.empty()) error = LoadFusedMetadata();
    return error;
  }
};

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_H_
