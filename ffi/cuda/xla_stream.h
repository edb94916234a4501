// How a handler gets the stream that XLA runs it on.
#ifndef JAXNSA_CUDA_XLA_STREAM_H_
#define JAXNSA_CUDA_XLA_STREAM_H_

#include "computations.h"
#include "xla/ffi/api/ffi.h"

namespace jaxnsa {

using XlaStream = xla::ffi::PlatformStream<Stream>;

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_XLA_STREAM_H_
