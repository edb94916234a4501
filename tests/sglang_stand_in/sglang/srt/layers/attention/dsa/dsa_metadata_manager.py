"""Imports the functions as SGLang's module of this name does."""

from sglang.kernels.ops.attention.dsa.metadata import (
    fused_dsa_decode_metadata,
    fused_dsa_draft_extend_metadata,
    fused_dsa_target_verify_metadata,
)

renamed = fused_dsa_decode_metadata


class Backend:
    def __init__(self):
        self.decode = fused_dsa_decode_metadata
        self.target_verify = fused_dsa_target_verify_metadata
        self.draft_extend = fused_dsa_draft_extend_metadata

    def copy(self, **given):
        from sglang.kernels.ops.attention.dsa.fused_metadata_copy import fused_metadata_copy_cuda

        fused_metadata_copy_cuda(**given)
