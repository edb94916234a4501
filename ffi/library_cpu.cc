// The library for the CPU: XLA FFI handlers, and the same for direct callers.
#include <optional>

#include "cpu.h"
#include "direct.h"
#include "handlers.h"

template <>
struct xla::ffi::CtxDecoding<jaxnsa::Cpu::Stream> {
  using Type = jaxnsa::Cpu::Stream;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*,
                                    DiagnosticEngine&) {
    return Type{};
  }
};

JAXNSA_DEFINE_HANDLERS(jaxnsa::Cpu, xla::ffi::Ffi::Bind().Ctx<jaxnsa::Cpu::Stream>())

JAXNSA_DEFINE_DIRECT(jaxnsa::Cpu)
