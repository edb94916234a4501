// The computations on the CPU: the platform of the handlers.
#ifndef JAXNSA_CPU_H_
#define JAXNSA_CPU_H_

#include <string>

#include "metadata.h"

namespace jaxnsa {

// The functions return an error message, which is always empty. They know one algorithm each: a
// variant makes no difference.
struct Cpu {
  struct Stream {};  // calls run to completion

  static Stream StreamOf(void*) { return {}; }
  static bool IsCurrentDevice(int) { return true; }

  static std::string Load() { return ""; }

  static std::string PrefixSum(Stream stream, PrefixSumVariant variant, const int32_t* x, int64_t n,
                               int32_t* out);
  static std::string FillDraftExtend(Stream stream, DraftExtendVariant variant,
                                     const DraftExtend& args);
  static std::string CopyMetadata(Stream stream, const Copy& args);
  static std::string FusedMetadata(Stream stream, const Fused& args);
};

}  // namespace jaxnsa

#endif  // JAXNSA_CPU_H_
