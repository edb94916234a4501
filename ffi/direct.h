// The computations for callers that are not XLA: C functions of the structs of metadata.h, on the
// caller's stream. Nothing is checked but the size of a struct; jaxnsa/direct.py does that.
#ifndef JAXNSA_DIRECT_H_
#define JAXNSA_DIRECT_H_

#include <cstddef>
#include <string>

#include "metadata.h"

namespace jaxnsa {

// What a C function returns: nullptr for success, otherwise a message that holds until the thread's
// next error.
inline const char* Message(std::string error) {
  thread_local std::string held;
  held = std::move(error);
  return held.empty() ? nullptr : held.c_str();
}

}  // namespace jaxnsa

#define JAXNSA_DEFINE_DIRECT(Platform)                                                            \
  extern "C" size_t jaxnsa_size_of_fused() { return sizeof(jaxnsa::Fused); }                      \
  extern "C" size_t jaxnsa_size_of_copy() { return sizeof(jaxnsa::Copy); }                        \
  extern "C" size_t jaxnsa_size_of_draft_extend() { return sizeof(jaxnsa::DraftExtend); }         \
  extern "C" const char* jaxnsa_direct_load() { return jaxnsa::Message(Platform::Load()); }       \
  extern "C" const char* jaxnsa_direct_fused_metadata(void* stream, const jaxnsa::Fused* args) {  \
    return jaxnsa::Message(Platform::FusedMetadata(Platform::StreamOf(stream), *args));           \
  }                                                                                               \
  extern "C" const char* jaxnsa_direct_copy_metadata(void* stream, const jaxnsa::Copy* args) {    \
    return jaxnsa::Message(Platform::CopyMetadata(Platform::StreamOf(stream), *args));            \
  }                                                                                               \
  extern "C" const char* jaxnsa_direct_fill_draft_extend(void* stream, int32_t variant,           \
                                                         const jaxnsa::DraftExtend* args) {       \
    return jaxnsa::Message(                                                                       \
        Platform::FillDraftExtend(Platform::StreamOf(stream),                                     \
                                  static_cast<jaxnsa::DraftExtendVariant>(variant), *args));      \
  }

#endif  // JAXNSA_DIRECT_H_
