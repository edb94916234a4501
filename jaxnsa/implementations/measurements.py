"""The order in which implementations are tried where none is named, and why: measurements."""

from typing import NamedTuple

FUSED_METADATA = "fused_metadata_precompute_and_broadcast"


class Call(NamedTuple):
    """What of a call decides which rule holds.

    Attributes:
      function: name of the public function.
      requests: the batch size, or the length of the vector.
      num_backends: of a broadcast.
      even: whether requests have equally many rows, and no schedules or pooled arrays are wanted.
    """

    function: str = FUSED_METADATA
    requests: int = 1
    num_backends: int = 1
    even: bool = True


class Rule(NamedTuple):
    """An order of implementations.

    Attributes:
      platform: "gpu" or "cpu".
      functions: which it holds for; () for all.
      requests, num_backends: from which it holds.
      even: whether it holds only for calls that are.
      order: names, the fastest first. The first that can run is taken.
      reason: what was measured.
    """

    platform: str
    functions: tuple[str, ...]
    requests: int
    num_backends: int
    even: bool
    order: tuple[str, ...]
    reason: str

    def holds(self, platform: str, call: Call) -> bool:
        """Whether it decides a call on "gpu" or "cpu" that no earlier one does."""
        return (
            platform == self.platform
            and (not self.functions or call.function in self.functions)
            and call.requests >= self.requests
            and call.num_backends >= self.num_backends
            and (call.even or not self.even)
        )


class Measurement(NamedTuple):
    """Microseconds of one broadcast in place, tail "keep", page 64, top-k 2048, decode.

    Attributes:
      platform: "gpu" or "cpu".
      bs, max_len, num_backends, live: the shape; lengths are uniform between live / 2 and live.
      microseconds: by implementation: device time on a GPU, end to end on a CPU.
    """

    platform: str
    bs: int
    max_len: int
    num_backends: int
    live: int
    microseconds: dict[str, float]


RULES = (
    Rule(
        "gpu",
        ("prefix_sum",),
        8192,
        1,
        False,
        ("pallas", "ffi", "triton", "xla"),
        "pallas adds up 65,536 elements in 4.1 microseconds, ffi in 4.8 and triton in 7.1",
    ),
    Rule(
        "gpu",
        ("prefix_sum",),
        0,
        1,
        False,
        ("triton", "pallas", "ffi", "xla"),
        "up to 1,024 elements triton is ahead of pallas and ffi by up to 0.2 microseconds, and "
        "never further than 0.1 behind",
    ),
    Rule(
        "gpu",
        (FUSED_METADATA,),
        768,
        2,
        True,
        ("ffi", "pallas", "triton", "xla"),
        "ffi is ahead of pallas by up to a half where it writes tables of pages alone, or few new "
        "columns, of which a warp has a request's; elsewhere they take as long, within a tenth",
    ),
    Rule(
        "gpu",
        (),
        0,
        1,
        False,
        ("pallas", "triton", "ffi", "xla"),
        "where a launch is short pallas is ahead of triton and ffi by up to a half, and with "
        "FlashMLA's schedule of triton by more; where memory decides it is within 3% of the "
        "fastest; ffi is an eighth ahead for eight backends of 32 requests, and a fifth with the "
        "indexer's schedules alone at 1,024 requests",
    ),
    Rule(
        "cpu",
        (),
        0,
        1,
        False,
        ("ffi", "xla"),
        "ffi is ahead of xla by a seventh and, in small calls, by up to fifteen times, but for "
        "copies of megabytes, which xla spreads over all cores; what is exported or "
        "lowered for another platform is computed by xla",
    ),
)
"""The first rule that fits a call decides."""

MEASURED_ON = {
    "gpu": "NVIDIA H200, jax 0.11.2, jax-triton 0.3.1, Triton 3.6, commit 5c92668",
    "cpu": "2 cores, jax 0.10.2, commit 5c92668",
}

MEASUREMENTS = (
    Measurement("gpu", 32, 2048, 3, 2048, {"pallas": 1.5, "ffi": 1.8, "triton": 1.8, "xla": 15.0}),
    Measurement(
        "gpu", 32, 65_536, 3, 8192, {"pallas": 1.9, "ffi": 2.3, "triton": 3.0, "xla": 23.3}
    ),
    Measurement(
        "gpu", 32, 65_536, 3, 65_536, {"pallas": 6.3, "triton": 6.3, "ffi": 6.8, "xla": 23.3}
    ),
    Measurement(
        "gpu", 6, 131_072, 1, 131_072, {"pallas": 2.0, "triton": 2.3, "ffi": 2.4, "xla": 6.3}
    ),
    Measurement(
        "gpu", 256, 32_768, 8, 16_384, {"pallas": 30.3, "ffi": 30.3, "triton": 32.0, "xla": 183.0}
    ),
    Measurement(
        "gpu", 128, 131_072, 3, 131_072, {"pallas": 55.1, "triton": 55.5, "ffi": 58.3, "xla": 137.5}
    ),
    Measurement(
        "gpu", 1024, 32_768, 3, 4096, {"ffi": 13.0, "pallas": 13.4, "triton": 13.8, "xla": 259.0}
    ),
    Measurement("cpu", 32, 2048, 3, 2048, {"ffi": 165, "xla": 340}),
    Measurement("cpu", 32, 65_536, 3, 8192, {"ffi": 552, "xla": 765}),
    Measurement("cpu", 6, 131_072, 1, 131_072, {"ffi": 489, "xla": 685}),
    Measurement("cpu", 128, 131_072, 3, 131_072, {"ffi": 18414, "xla": 23859}),
    Measurement("cpu", 1024, 32_768, 3, 4096, {"ffi": 6281, "xla": 10089}),
)


def measured_platform(platform: str) -> str:
    """The platform whose rules and measurements hold for a JAX platform."""
    return platform if platform == "gpu" else "cpu"


def rule(platform: str, call: Call) -> Rule:
    """The rule that decides a call on a JAX platform."""
    here = measured_platform(platform)
    return next(rule for rule in RULES if rule.holds(here, call))


def nearest(platform: str, bs: int, max_len: int, num_backends: int) -> Measurement:
    """The measurement whose shape is nearest, by the ratio of the elements written and of bs."""

    def distance(m: Measurement) -> float:
        ratios = (
            bs / m.bs,
            (bs * max_len * num_backends) / (m.bs * m.max_len * m.num_backends),
        )
        return sum(max(r, 1 / r) for r in ratios)

    here = measured_platform(platform)
    return min((m for m in MEASUREMENTS if m.platform == here), key=distance)
