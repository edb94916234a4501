// How a handler gets the stream that XLA runs it on: on a CPU there is none.
#ifndef JAXNSA_CPU_XLA_STREAM_H_
#define JAXNSA_CPU_XLA_STREAM_H_

#include <optional>

#include "computations.h"
#include "xla/ffi/api/ffi.h"

namespace jaxnsa {

struct XlaStream {};

}  // namespace jaxnsa

template <>
struct xla::ffi::CtxDecoding<jaxnsa::XlaStream> {
  using Type = jaxnsa::Stream;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*,
                                    DiagnosticEngine&) {
    return nullptr;
  }
};

#endif  // JAXNSA_CPU_XLA_STREAM_H_
