"""Pallas Mosaic GPU kernels for the attention metadata of DeepSeek sparse attention.

Each function is one kernel launch. The way in: `fused_metadata` is the whole computation; `rows`
says how table rows map to requests, `tables` how a table is cut into tiles, `lanes` what a block
can do, and `ptx` what of that Pallas has no name for.
Needs compute capability 9.0 (Hopper) or newer; with `interpret=InterpretGPUParams(...)` of
`pallas_kernels.jax_internals` the kernels run anywhere, slowly, and with races and accesses outside
a buffer detected.
"""

from pallas_kernels.copy import copy
from pallas_kernels.fill_draft_extend_metadata import fill_draft_extend_metadata
from pallas_kernels.fused_metadata import fused_metadata
from pallas_kernels.prefix_sum import prefix_sum
from pallas_kernels.tuning import BlockConfig

__all__ = [
    "BlockConfig",
    "copy",
    "fill_draft_extend_metadata",
    "fused_metadata",
    "prefix_sum",
]
