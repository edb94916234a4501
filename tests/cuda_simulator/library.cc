// The FFI library for the CPU with the CUDA kernels inside.
#include <optional>

#include "cuda.h"
#include "direct.h"
#include "handlers.h"

template <>
struct xla::ffi::CtxDecoding<cudaStream_t> {
  using Type = cudaStream_t;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*,
                                    DiagnosticEngine&) {
    return nullptr;
  }
};

JAXNSA_DEFINE_HANDLERS(jaxnsa::Cuda, xla::ffi::Ffi::Bind().Ctx<cudaStream_t>())

JAXNSA_DEFINE_DIRECT(jaxnsa::Cuda)
