// The fused kernels for a few backends with schedules.
#include "fused_kernel.cuh"

namespace jaxnsa {

template void LaunchForBackends<kFewBackends, true>(Stream, const FusedMetadataArguments&);
template void LoadForBackends<kFewBackends, true>();

}  // namespace jaxnsa
