// The computations for callers that are not XLA: C functions of the structs of metadata.h and
// tensors.h. Nothing is checked but what tensors.h says; Python does that.
#ifndef JAXNSA_DIRECT_H_
#define JAXNSA_DIRECT_H_

#include <algorithm>
#include <cstddef>
#include <string>

#include "metadata.h"
#include "tensors.h"

namespace jaxnsa {

// What a C function returns: nullptr for success, otherwise a message that holds until the thread's
// next error.
inline const char* Message(std::string error) {
  thread_local std::string held;
  held = std::move(error);
  return held.empty() ? nullptr : held.c_str();
}

// What a C function returns that has declined to do something.
constexpr const char* kDeclined = "";

// Takes the tensors of a step and launches it on their producer's current stream, if that is on the
// current device.
template <typename Platform>
const char* LaunchStep(const Step& step, const Rows& rows, const StepTensors& tensors) {
  const Tensor& there = *step.expected;
  if (!Platform::IsCurrentDevice(there.device_id) || !Take(step, rows, tensors)) return kDeclined;
  void* stream = nullptr;
  if (there.device_type != kDlCpu &&
      step.current_stream(there.device_type, there.device_id, &stream) != 0) {
    return kDeclined;
  }
  return Message(Platform::FusedMetadata(Platform::StreamOf(stream), *step.fused));
}

}  // namespace jaxnsa

#define JAXNSA_DEFINE_DIRECT(Platform)                                                            \
  extern "C" size_t jaxnsa_size_of_fused() { return sizeof(jaxnsa::Fused); }                      \
  extern "C" size_t jaxnsa_size_of_copy() { return sizeof(jaxnsa::Copy); }                        \
  extern "C" size_t jaxnsa_size_of_draft_extend() { return sizeof(jaxnsa::DraftExtend); }         \
  extern "C" size_t jaxnsa_size_of_tensor() { return sizeof(jaxnsa::Tensor); }                    \
  extern "C" size_t jaxnsa_size_of_step() { return sizeof(jaxnsa::Step); }                        \
  extern "C" const char* jaxnsa_direct_load() { return jaxnsa::Message(Platform::Load()); }       \
  extern "C" bool jaxnsa_describe_tensors(jaxnsa::DescribeTensor describe, int64_t count,         \
                                          void* const* objects, jaxnsa::Tensor* out) {            \
    return std::all_of(objects, objects + count, [&](void* object) {                              \
      return jaxnsa::Describe(describe, object, out++);                                           \
    });                                                                                           \
  }                                                                                               \
  extern "C" const char* jaxnsa_direct_step(const jaxnsa::Step* step, const jaxnsa::Rows* rows,   \
                                            void* seq_lens, void* req_pool_indices,               \
                                            void* req_to_token, void* extend_seq_lens) {          \
    return jaxnsa::LaunchStep<Platform>(                                                          \
        *step, *rows, {seq_lens, req_pool_indices, req_to_token, extend_seq_lens});               \
  }                                                                                               \
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
