"""Attention metadata for DeepSeek sparse attention (NSA/DSA), in one launch for all backends."""

from importlib.metadata import version

from jaxnsa import reference
from jaxnsa.batch_tracker import BatchTracker
from jaxnsa.config import override
from jaxnsa.implementations import ffi
from jaxnsa.implementations.choice import ImplementationUnavailableError, get_kernel_info
from jaxnsa.metadata import (
    DraftExtendSeqlens,
    ForwardMode,
    NSAMetadata,
    RaggedPagedAttentionMetadata,
)
from jaxnsa.operations import (
    fill_draft_extend_metadata,
    fused_metadata_copy,
    fused_metadata_precompute_and_broadcast,
    precompute_decode_metadata,
    precompute_draft_extend_metadata,
    precompute_extend_metadata,
    precompute_target_verify_metadata,
    prefix_sum,
)
from jaxnsa.ragged_paged_attention import ragged_paged_attention_metadata
from jaxnsa.schedules import FlashMlaSchedule, PagedMqaSchedule, Schedules, TopkPlan
from jaxnsa.value_checks import validate_inputs

__version__ = version("jaxnsa")

__all__ = [
    "BatchTracker",
    "DraftExtendSeqlens",
    "FlashMlaSchedule",
    "ForwardMode",
    "ImplementationUnavailableError",
    "NSAMetadata",
    "PagedMqaSchedule",
    "RaggedPagedAttentionMetadata",
    "Schedules",
    "TopkPlan",
    "ffi",
    "fill_draft_extend_metadata",
    "fused_metadata_copy",
    "fused_metadata_precompute_and_broadcast",
    "get_kernel_info",
    "override",
    "precompute_decode_metadata",
    "precompute_draft_extend_metadata",
    "precompute_extend_metadata",
    "precompute_target_verify_metadata",
    "prefix_sum",
    "ragged_paged_attention_metadata",
    "reference",
    "validate_inputs",
]
