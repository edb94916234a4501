"""Settings: precedence, both families of environment variables, and no stale compilation."""

import dataclasses
import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import DEFAULT, inputs

import jaxnsa
from jaxnsa import ForwardMode, Schedules, TopkPlan, config, operations
from jaxnsa.implementations import IMPLEMENTATIONS, xla
from jaxnsa.implementations.choice import choose
from jaxnsa.implementations.measurements import (
    MEASURED_ON,
    MEASUREMENTS,
    Call,
    nearest,
    rule,
)

ARGUMENTS = inputs(3)


@pytest.fixture
def other(monkeypatch):
    """A second implementation whose results tell that it ran: its prefix sums are negated."""
    module = types.SimpleNamespace(**vars(xla))
    module.prefix_sum = lambda x: -xla.prefix_sum(x)
    module.unavailable = lambda platform: None
    monkeypatch.setitem(IMPLEMENTATIONS, "other", module)
    return module


def ran(**options):
    return "other" if jaxnsa.prefix_sum(np.array([1], np.int32), **options)[1] < 0 else "xla"


def test_argument_beats_override_beats_environment(other, monkeypatch):
    assert ran() == "xla"
    monkeypatch.setenv("JAXNSA_IMPLEMENTATION", "other")
    assert ran() == "other"
    with jaxnsa.override(implementation="xla"):
        assert ran() == "xla"
        assert ran(implementation="other") == "other"
        with jaxnsa.override(implementation=("other", "xla")):
            assert ran() == "other"
        assert ran() == "xla"
    assert ran() == "other"
    monkeypatch.setenv("JAXNSA_IMPLEMENTATION", "xla, other")
    assert ran() == "xla"


def test_override_reaches_functions_that_the_caller_has_jitted(other):
    step = jax.jit(lambda x: jaxnsa.prefix_sum(x))
    x = np.array([1], np.int32)
    assert step(x)[1] == 1
    with jaxnsa.override(implementation="other"):
        assert step(x)[1] == -1
    assert step(x)[1] == 1


def test_strategy_switches(monkeypatch):
    assert config.settings().strategy == "ultra_fast"
    with jaxnsa.override(fused_broadcast=False):
        assert config.settings().strategy == "fast"
        with jaxnsa.override(mtp_precompute_metadata=False):
            assert config.settings().strategy == "fallback"
    with jaxnsa.override(mtp_precompute_metadata=False):
        assert config.settings().strategy == "fallback"
    monkeypatch.setenv("JAXNSA_ENABLE_FUSED_BROADCAST", "0")
    assert config.settings().strategy == "fast"
    monkeypatch.setenv("JAXNSA_ENABLE_MTP_PRECOMPUTE_METADATA", "false")
    assert config.settings().strategy == "fallback"


@pytest.mark.parametrize(
    "setting", ("fused_broadcast", "mtp_precompute_metadata", "triton_metadata")
)
def test_sglang_names_count_where_ours_are_unset(setting, monkeypatch):
    ours, theirs = config.ENVIRONMENT[setting]
    assert theirs == ours.replace("JAXNSA_", "SGLANG_NSA_")
    monkeypatch.setenv(theirs, "0")
    assert getattr(config.settings(), setting) is False
    monkeypatch.setenv(ours, "1")
    assert getattr(config.settings(), setting) is True


def test_bad_settings(monkeypatch):
    monkeypatch.setenv("JAXNSA_VALIDATE", "maybe")
    with pytest.raises(ValueError, match="JAXNSA_VALIDATE: got 'maybe', expected 1, true"):
        jaxnsa.prefix_sum(ARGUMENTS[0])
    monkeypatch.delenv("JAXNSA_VALIDATE")
    monkeypatch.setenv("JAXNSA_IMPLEMENTATION", "cuda")
    with pytest.raises(ValueError, match="JAXNSA_IMPLEMENTATION: got 'cuda', expected one of 'pa"):
        jaxnsa.prefix_sum(ARGUMENTS[0])
    with (
        pytest.raises(ValueError, match="^implementation: got 'rocm', expected one of 'pallas', "),
        jaxnsa.override(implementation="rocm"),
    ):
        jaxnsa.prefix_sum(ARGUMENTS[0])
    with (
        pytest.raises(TypeError, match="validate: got 1, expected True, False or None"),
        jaxnsa.override(validate=1),
    ):
        pass


def test_an_implementation_that_cannot_run_says_why(other):
    other.unavailable = lambda platform: "no such GPU; install one"
    with pytest.raises(
        jaxnsa.ImplementationUnavailableError,
        match="implementation 'other' cannot run here: no such GPU; install one",
    ):
        ran(implementation="other")
    assert ran(implementation=("other", "xla")) == "xla"
    info = jaxnsa.get_kernel_info()
    assert info["implementations"]["other"] == {
        "available": False,
        "reason": "no such GPU; install one",
        "version": info["implementations"]["xla"]["version"],
        "prefix_sum_fusion": False,
        "variants": {},
    }
    assert info["default"] == DEFAULT


def test_a_name_is_taken_at_its_word_while_tracing(other):
    other.unavailable = lambda platform: None if platform is None else f"not on {platform}"
    assert choose("other", config.settings(), None, Call()) == "other"
    with pytest.raises(jaxnsa.ImplementationUnavailableError, match="not on cpu"):
        choose("other", config.settings(), "cpu", Call())
    assert choose(("other", "xla"), config.settings(), None, Call()) == "xla"


@pytest.mark.parametrize(
    "call, order",
    [
        (Call(requests=32, num_backends=3), ("pallas", "triton", "ffi", "xla")),
        (Call(requests=767, num_backends=3), ("pallas", "triton", "ffi", "xla")),
        (Call(requests=768, num_backends=2), ("ffi", "pallas", "triton", "xla")),
        (Call(requests=768, num_backends=1), ("pallas", "triton", "ffi", "xla")),
        (Call(requests=768, num_backends=2, even=False), ("pallas", "triton", "ffi", "xla")),
        (Call("fused_metadata_copy", 768, 2), ("pallas", "triton", "ffi", "xla")),
        (Call("prefix_sum", 1000), ("triton", "pallas", "ffi", "xla")),
        (Call("prefix_sum", 10_000), ("pallas", "ffi", "triton", "xla")),
    ],
)
def test_a_gpu_takes_the_first_that_runs(call, order, monkeypatch):
    for k, name in enumerate(order):
        for other in order[:k]:
            module = types.SimpleNamespace(unavailable=lambda platform: "not here")
            monkeypatch.setitem(IMPLEMENTATIONS, other, module)
        for other in order[k:]:
            module = types.SimpleNamespace(unavailable=lambda platform: None)
            monkeypatch.setitem(IMPLEMENTATIONS, other, module)
        assert choose(None, config.settings(), "gpu", call) == name
    without = dataclasses.replace(config.settings(), triton_metadata=False)
    everything_runs = types.SimpleNamespace(unavailable=lambda platform: None)
    for name in order:
        monkeypatch.setitem(IMPLEMENTATIONS, name, everything_runs)
    first = choose(None, without, "gpu", call)
    assert first == next(name for name in order if name != "triton")


def test_every_rule_agrees_with_what_was_measured():
    """The first of an order is the fastest within a tenth."""
    for m in MEASUREMENTS:
        decided = rule(m.platform, Call(requests=m.bs, num_backends=m.num_backends))
        assert set(decided.order) <= set(m.microseconds)
        assert m.microseconds[decided.order[0]] <= 1.1 * min(m.microseconds.values()), m


@pytest.mark.parametrize(
    "platform, device, metric, digits",
    [("cpu", "2-core-cpu", "latency_us", 0), ("gpu", "nvidia-h200", "hot_device_us", 1)],
)
def test_the_evidence_is_what_was_recorded(platform, device, metric, digits):
    folder = Path(__file__).parents[1] / "benchmarks" / "results" / device
    recorded = json.loads((folder / "roofline.json").read_text())
    assert recorded["commit"] in MEASURED_ON[platform]
    here = [m for m in MEASUREMENTS if m.platform == platform]
    assert here
    for m in here:
        case = dict(zip(("bs", "max_len", "N", "live"), m[1:5], strict=True)) | {"mode": "decode"}
        took = {
            record["name"]: round(record["metrics"][metric], digits)
            for record in recorded["records"]
            if record["case"] == case and record["name"] in m.microseconds
        }
        assert took == m.microseconds, m


def test_the_nearest_measurement():
    for m in MEASUREMENTS:
        found = nearest(m.platform, m.bs, m.max_len, m.num_backends)
        assert found[:4] == m[:4]
    assert nearest("tpu", 1, 1, 1).platform == "cpu"


@pytest.mark.parametrize(
    "changed, even",
    [
        ({}, True),
        ({"forward_mode": ForwardMode.TARGET_VERIFY, "num_draft_tokens": 2}, True),
        (
            {
                "forward_mode": ForwardMode.DRAFT_EXTEND,
                "extend_seq_lens": ARGUMENTS[0],
                "max_total_tokens": 9,
            },
            False,
        ),
        ({"schedules": Schedules(topk_plan=TopkPlan.h200())}, False),
        ({"index_kpool": 2}, False),
    ],
)
def test_a_broadcast_says_what_decides_its_rule(changed, even, monkeypatch):
    asked = []

    def watched(requested, settings, platform, call):
        asked.append(call)
        return "xla"

    monkeypatch.setattr(operations, "choose", watched)
    jaxnsa.fused_metadata_precompute_and_broadcast(*ARGUMENTS, num_backends=2, **changed)
    assert asked == [Call(requests=3, num_backends=2, even=even)]
