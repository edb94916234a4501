"""Triton kernels for the attention metadata of DeepSeek sparse attention, by jax-triton.

Each function is one kernel launch. The way in: `fused_metadata` is the whole computation; `rows`
says how table rows map to requests, `tables` how a tile of a table is read and written,
`destinations` where a value goes, and `launch` how a kernel is called. Needs compute capability 8.0
(Ampere) or newer; with TRITON_INTERPRET=1 set before the import, Triton's interpreter runs the
kernels on a CPU, slowly.
"""

from jaxnsa.implementations.triton_kernels.copy import copy
from jaxnsa.implementations.triton_kernels.fill_draft_extend_metadata import (
    fill_draft_extend_metadata,
)
from jaxnsa.implementations.triton_kernels.fused_metadata import fused_metadata
from jaxnsa.implementations.triton_kernels.prefix_sum import prefix_sum
from jaxnsa.implementations.triton_kernels.tuning import BlockConfig

__all__ = [
    "BlockConfig",
    "copy",
    "fill_draft_extend_metadata",
    "fused_metadata",
    "prefix_sum",
]
