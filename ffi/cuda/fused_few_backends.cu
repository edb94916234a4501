// The fused kernels for a few backends.
#include "fused_kernel.cuh"

namespace jaxnsa {

template void LaunchForBackends<kFewBackends, false>(Stream, const FusedMetadataArguments&);
template void LoadForBackends<kFewBackends, false>();

}  // namespace jaxnsa
