"""Pallas Mosaic GPU kernels for the attention metadata of DeepSeek sparse attention.

Each function is one kernel launch. The way in: `fused_metadata` is the whole job; `rows` says how
table rows map to requests, `tables` how a table is cut into blocks, `lanes` what a block can do,
and `ptx` what of that Pallas has no name for.
Needs compute capability 9.0 (Hopper) or newer; with `interpret=InterpretGPUParams(...)` of
`jax._src.pallas.mosaic_gpu.interpret.params` the kernels run anywhere, slowly, and with races and
accesses outside a buffer detected.
"""

from pallas_kernels.broadcast import broadcast
from pallas_kernels.fused_metadata import fused_metadata
from pallas_kernels.prefix_sum import prefix_sum
from pallas_kernels.seqlen_expansion import seqlen_expansion
from pallas_kernels.tuning import BlockConfig

__all__ = [
    "BlockConfig",
    "broadcast",
    "fused_metadata",
    "prefix_sum",
    "seqlen_expansion",
]
