// The library for NVIDIA GPUs: XLA FFI handlers, and the same for direct callers.
#include "cuda.h"
#include "direct.h"
#include "handlers.h"

JAXNSA_DEFINE_HANDLERS(jaxnsa::Cuda,
                       xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>())

JAXNSA_DEFINE_DIRECT(jaxnsa::Cuda)
