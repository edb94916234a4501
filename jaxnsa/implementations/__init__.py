"""Which code computes: one typed interface, and the implementations of it by name."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax

from jaxnsa.implementations import ffi, pallas, portable, triton, xla
from jaxnsa.metadata import DraftExtendSeqlens, NSAMetadata
from jaxnsa.spec import Inputs, Spec


class Implementation(Protocol):
    """What the module of an implementation defines.

    The four computations are called while `jax.jit` traces, with int32 arrays whose shapes are
    checked and whose values may be anything, and never for nothing: `prefix_sum` of at least one
    element, `fill_draft_extend_metadata` and `fused_metadata` of at least one request and one row,
    `copy` of arrays that hold something each.
    """

    def unavailable(self, platform: str | None) -> str | None:
        """Why this cannot run on a platform, and what would make it run; None where it can.

        A platform of None asks only about what is installed.
        """

    def version(self) -> str | None:
        """What it is built on; None where that is not installed."""

    def prefix_sum(self, x: jax.Array) -> jax.Array:
        """int32 [n] -> int32 [n + 1]: 0, then the inclusive prefix sum."""

    def fill_draft_extend_metadata(
        self,
        extend_seq_lens: jax.Array,
        seq_lens: jax.Array,
        *,
        nsa_index_topk: int,
        max_total_tokens: int,
    ) -> DraftExtendSeqlens:
        """See `jaxnsa.fill_draft_extend_metadata`."""

    def fused_metadata(
        self, inputs: Inputs, out: tuple[NSAMetadata, ...] | None, spec: Spec
    ) -> tuple[NSAMetadata, ...]:
        """Computes the metadata of `spec` for all of its destinations, in `out` where given."""

    def copy(
        self,
        src: NSAMetadata,
        out: tuple[NSAMetadata, ...] | None,
        *,
        num_backends: int,
        live: Spec | None = None,
    ) -> tuple[NSAMetadata, ...]:
        """Copies `src` to `num_backends` destinations, `out` where given.

        With `live`, the computation that `src` came from, only the live columns of its tables.
        """


IMPLEMENTATIONS: dict[str, Implementation] = {
    "pallas": pallas,
    "ffi": ffi,
    "triton": triton,
    "xla": xla,
}

PORTABLE = "portable"
"""Stands for "ffi" where it was chosen and not named."""


def computations(implementation: str) -> Any:
    """The computations of an implementation, or of `PORTABLE`."""
    return portable if implementation == PORTABLE else IMPLEMENTATIONS[implementation]


FUSED = ("pallas", "ffi", "triton")
"""Those that take one launch for each function, prefix sums included, and for eight backends."""

VARIANTS: Mapping[str, Mapping[str, Any]] = {"ffi": ffi.VARIANTS}
"""By implementation, for each function that has several variants, their names, the default first,
and what they do."""
