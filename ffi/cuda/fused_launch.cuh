// Launches of the fused kernel, a family of kernels for each kind of launch. Each is compiled by a
// file of its own, since that takes a minute: fused_few_backends.cu, fused_many_backends.cu and
// fused_with_schedules.cu.
#ifndef JAXNSA_CUDA_FUSED_LAUNCH_CUH_
#define JAXNSA_CUDA_FUSED_LAUNCH_CUH_

#include "computations.h"

namespace jaxnsa {

// For up to kCapacity backends; with kSchedules also schedules and pooled arrays.
template <int kCapacity, bool kSchedules>
void LaunchForBackends(Stream stream, const FusedMetadataArguments& args);

// Loads what that launches.
template <int kCapacity, bool kSchedules>
void LoadForBackends();

}  // namespace jaxnsa

#endif  // JAXNSA_CUDA_FUSED_LAUNCH_CUH_
