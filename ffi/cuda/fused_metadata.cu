// Which launch a computation takes: one, or with schedules or pooled pages one for every few
// backends.
#include <algorithm>
#include <memory>

#include "fused_launch.cuh"
#include "launch.cuh"
#include "parameters.cuh"

namespace jaxnsa {
namespace {

// Whether a launch writes schedules or pooled arrays.
bool WantsSchedules(const FusedMetadataArguments& args) {
  return args.index_kpool > 1 || args.schedules.any();
}

// Launches of few backends each, which is all that kernels with schedules are compiled for.
void LaunchWithSchedules(Stream stream, const FusedMetadataArguments& args) {
  if (args.num_backends <= kFewBackends) {
    LaunchForBackends<kFewBackends, true>(stream, args);
    return;
  }
  const auto part = std::make_unique<FusedMetadataArguments>(args);
  for (int32_t first = 0; first < args.num_backends; first += kFewBackends) {
    part->num_backends = std::min(args.num_backends - first, kFewBackends);
    std::copy_n(args.backends + first, part->num_backends, part->backends);
    std::copy_n(args.backend_offsets + first, part->num_backends, part->backend_offsets);
    part->tracker.advances =
        args.tracker.advances && first + kFewBackends >= args.num_backends;
    LaunchForBackends<kFewBackends, true>(stream, *part);
  }
}

}  // namespace

void FusedMetadata(Stream stream, const FusedMetadataArguments& args) {
  if (WantsSchedules(args)) {
    LaunchWithSchedules(stream, args);
  } else if (args.num_backends <= kFewBackends) {
    LaunchForBackends<kFewBackends, false>(stream, args);
  } else {
    LaunchForBackends<kMaxBackends, false>(stream, args);
  }
}

void LoadFusedMetadata() {
  LoadForBackends<kFewBackends, false>();
  LoadForBackends<kMaxBackends, false>();
  LoadForBackends<kFewBackends, true>();
}

bool IsCurrentDevice(int device) {
  int current;
  return cudaGetDevice(&current) == cudaSuccess && current == device;
}

bool IsCapturing(Stream stream) {
  cudaStreamCaptureStatus status;
  return cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) == cudaSuccess &&
         status != cudaStreamCaptureStatusNone;
}

}  // namespace jaxnsa
