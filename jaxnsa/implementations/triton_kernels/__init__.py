"""Triton kernels for the attention metadata of DeepSeek sparse attention, by jax-triton.

Each function is one kernel launch. The way in: `fused_metadata` is the whole job; `rows` says how
table rows map to requests, `columns` how a piece of a row is written everywhere it goes, `launch`
how a kernel is called. Needs compute capability 8.0 (Ampere) or newer; with TRITON_INTERPRET=1 set
before the import, Triton's interpreter runs the kernels on a CPU, slowly.
"""

from jaxnsa.triton_kernels.broadcast import broadcast
from jaxnsa.triton_kernels.fused_metadata import fused_metadata
from jaxnsa.triton_kernels.prefix_sum import prefix_sum
from jaxnsa.triton_kernels.seqlen_expansion import seqlen_expansion
from jaxnsa.triton_kernels.tuning import BlockConfig

__all__ = [
    "BlockConfig",
    "broadcast",
    "fused_metadata",
    "prefix_sum",
    "seqlen_expansion",
]
