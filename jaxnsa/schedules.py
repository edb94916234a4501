"""What the consumers of a step want beside its metadata: how they split the step's work.

These are static descriptions. `NSAMetadata` holds the arrays that follow from them and the lengths
of a step, and `reference_schedules.py` defines their values.
"""

import dataclasses
from typing import Literal, get_args

from jaxnsa.scalar_checks import flag, integer, one_of

PagedMqaLayout = Literal["legacy", "atoms", "sm90", "sm100"]
FlashMlaLengths = Literal["topk", "nsa_cache_seqlens", "cache_seqlens"]
FlashMlaLayout = Literal["current", "legacy"]

MAX_MULTIPROCESSORS = 1024
"""The most multiprocessors, and parts, that work is split between: kernels look at all at once."""

MAX_PAIRS = 32
"""The most pairs of a `TopkPlan`: kernels take them as parameters."""


@dataclasses.dataclass(frozen=True)
class PagedMqaSchedule:
    """DeepGEMM's paged MQA logits, which the indexer runs: which multiprocessor scores which keys.

    Attributes:
      num_sms: multiprocessors that share the work: 132 on an H200.
      layout: what DeepGEMM reads: "legacy" up to January 2026, "atoms" from April to June 2026,
        from then on "sm90" on Hopper and "sm100" on Blackwell.
      per_row: whether in target verify every row is an item of its own, as Hopper's kernels want
        it; False: a request is one item of num_draft_tokens rows. Decode has one row for each
        request, and in draft extend every row is an item.

    Raises:
      ValueError, TypeError: an attribute is none of these.
    """

    num_sms: int
    layout: PagedMqaLayout
    per_row: bool = False

    def __post_init__(self) -> None:
        _set(self, "num_sms", integer("num_sms", self.num_sms, 1, MAX_MULTIPROCESSORS))
        one_of("layout", self.layout, get_args(PagedMqaLayout))
        flag("per_row", self.per_row)

    def units_per_segment(self, next_n: int) -> int:
        """Units of work that 256 keys of an item of `next_n` rows count as."""
        if self.layout == "legacy":
            return 1
        return next_n if self.layout == "sm100" else (next_n + 1) // 2


@dataclasses.dataclass(frozen=True)
class TopkPlan:
    """SGLang's fused top-k: which rows are so long that clusters share them.

    Of the pairs, from the largest threshold down, it stops at the first that more rows exceed than
    its capacity; the threshold is the last before it, and the largest one where that is the first.

    Attributes:
      pairs: (threshold in tokens, capacity in rows), thresholds ascending; 1 to 32 of them.
      floor: the threshold is at least this, in tokens.

    Raises:
      ValueError, TypeError: an attribute is none of these.
    """

    pairs: tuple[tuple[int, int], ...]
    floor: int = 32_768

    def __post_init__(self) -> None:
        try:
            pairs = tuple((threshold, capacity) for threshold, capacity in self.pairs)
        except (TypeError, ValueError):
            raise TypeError(f"pairs: got {self.pairs!r}, expected pairs of ints") from None
        pairs = tuple(
            (integer(f"pairs[{k}][0]", threshold, 0), integer(f"pairs[{k}][1]", capacity, 0))
            for k, (threshold, capacity) in enumerate(pairs)
        )
        if not 1 <= len(pairs) <= MAX_PAIRS:
            raise ValueError(f"pairs: got {len(pairs)} of them, expected 1 to {MAX_PAIRS}")
        for k in range(1, len(pairs)):
            if pairs[k][0] <= pairs[k - 1][0]:
                raise ValueError(
                    f"pairs[{k}][0]: got {pairs[k][0]}, expected more than {pairs[k - 1][0]}, the "
                    f"threshold before it"
                )
        _set(self, "pairs", pairs)
        _set(self, "floor", integer("floor", self.floor, 0))

    @classmethod
    def h200(cls) -> "TopkPlan":
        """What SGLang 0.5.23 has measured on an H200."""
        thresholds = (65_536, 98_304, 131_072, 196_608, 262_144, 393_216)
        return cls(tuple(zip(thresholds, (30, 45, 60, 80, 112, 128), strict=True)))

    @classmethod
    def b200(cls) -> "TopkPlan":
        """What SGLang 0.5.23 has measured on a B200."""
        thresholds = (32_768, 131_072, 163_840, 196_608, 262_144, 393_216, 524_288)
        return cls(tuple(zip(thresholds, (48, 66, 99, 132, 198, 231, 264), strict=True)))


@dataclasses.dataclass(frozen=True)
class FlashMlaSchedule:
    """FlashMLA's decoding attention: which part of the GPU attends to which blocks of 64 keys.

    Attributes:
      num_sm_parts: parts that share the work; FlashMLA's caller computes it from the number of
        multiprocessors and heads.
      lengths: keys of each item. Sparse attention, whose items are rows: "topk", the indexer's
        top-k for each, or "nsa_cache_seqlens", each its own. Dense attention, whose items are
        requests: "cache_seqlens".
      fixed_overhead_blocks: what beginning an item costs, in blocks: 5, or 3 on Blackwell with 128
        heads and 512 dimensions.
      layout: what FlashMLA reads: "legacy" up to January 2026 and by SGLang's two-tensor call,
        "current" from then on.

    Raises:
      ValueError, TypeError: an attribute is none of these.
    """

    num_sm_parts: int
    lengths: FlashMlaLengths = "topk"
    fixed_overhead_blocks: int = 5
    layout: FlashMlaLayout = "current"

    def __post_init__(self) -> None:
        _set(
            self, "num_sm_parts", integer("num_sm_parts", self.num_sm_parts, 1, MAX_MULTIPROCESSORS)
        )
        one_of("lengths", self.lengths, get_args(FlashMlaLengths))
        overhead = integer("fixed_overhead_blocks", self.fixed_overhead_blocks, 0, 2**16)
        _set(self, "fixed_overhead_blocks", overhead)
        one_of("layout", self.layout, get_args(FlashMlaLayout))

    @property
    def is_constant(self) -> bool:
        """Whether it follows from the number of items alone."""
        return self.lengths == "topk"


@dataclasses.dataclass(frozen=True)
class Schedules:
    """The schedules that a step is to compute; None of each: not wanted.

    Attributes:
      paged_mqa: `paged_mqa_ctx_lens` and `paged_mqa_schedule`.
      topk_plan: `topk_plan`.
      flash_mla: `flash_mla_schedule` and `flash_mla_num_splits`.

    Raises:
      TypeError: an attribute is of another type.
    """

    paged_mqa: PagedMqaSchedule | None = None
    topk_plan: TopkPlan | None = None
    flash_mla: FlashMlaSchedule | None = None

    def __post_init__(self) -> None:
        for name, expected in (
            ("paged_mqa", PagedMqaSchedule),
            ("topk_plan", TopkPlan),
            ("flash_mla", FlashMlaSchedule),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, expected):
                raise TypeError(
                    f"{name}: got {value!r}, expected a jaxnsa.{expected.__name__} or None"
                )


NO_SCHEDULES = Schedules()


def _set(instance: object, name: str, value: object) -> None:
    """Sets an attribute of a frozen dataclass while it is constructed."""
    object.__setattr__(instance, name, value)
