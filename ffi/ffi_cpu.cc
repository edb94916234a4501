// The XLA FFI library for the CPU.
#include <optional>

#include "cpu.h"
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
