// The fused kernels for many backends.
#include "fused_kernel.cuh"

namespace jaxnsa {

template void LaunchForBackends<kMaxBackends, false>(Stream, const FusedMetadataArguments&);
template void LoadForBackends<kMaxBackends, false>();

}  // namespace jaxnsa
