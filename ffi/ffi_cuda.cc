// The XLA FFI library for NVIDIA GPUs.
#include "cuda.h"
#include "handlers.h"

JAXNSA_DEFINE_HANDLERS(jaxnsa::Cuda,
                       xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>())
