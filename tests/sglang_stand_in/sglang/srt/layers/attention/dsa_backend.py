"""Imports a module of the functions, and one function that it does not call."""

from sglang.kernels.ops.attention.dsa import metadata
from sglang.kernels.ops.attention.dsa.fused_metadata_copy import fused_metadata_copy_multi_cuda

__all__ = ["fused_metadata_copy_multi_cuda", "metadata"]
