"""The machine that the tests run on, and `implementation`: everything that computes there."""

import gc
import itertools
import os
import shutil

ON_A_GPU_MACHINE = shutil.which("nvidia-smi") is not None
_FLAGS = ["--xla_force_host_platform_device_count=8"]  # simulated devices for shard_map
if not ON_A_GPU_MACHINE:
    # The tests compile some thousand small functions and run most of them once.
    _FLAGS += [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false",
    ]
# Before the first import of JAX.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
# Several processes, and PyTorch, share a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# What JAX keeps of all that was traced is looked through less often: a tenth of the time.
gc.set_threshold(200_000, 50, 1000)

import interpreted
import jax
import pytest

from jaxnsa.config import ENVIRONMENT
from jaxnsa.implementations import IMPLEMENTATIONS

ON_GPU = jax.default_backend() == "gpu"


def _implementations():
    for name, module in IMPLEMENTATIONS.items():
        if module.unavailable(jax.default_backend()) is None:
            yield pytest.param(name, marks=[pytest.mark.gpu] if ON_GPU else [])
    if not ON_GPU:
        for name, reason in interpreted.NAMES.items():
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            yield pytest.param(name, marks=[pytest.mark.interpreted, *marks])


@pytest.fixture(params=list(_implementations()), scope="module")
def implementation(request):
    """Every implementation that can run on this machine; on one with a GPU, marked gpu.

    Without a GPU also the kernels of `pallas` and `triton`, run by their interpreters, in tests
    that are not marked large.
    """
    name = request.param
    if name not in interpreted.NAMES:
        yield name
        return
    IMPLEMENTATIONS[name] = interpreted.module(name)
    yield name
    del IMPLEMENTATIONS[name]


@pytest.fixture(autouse=True)
def _races_fail(request):
    """Fails where the interpreter of Pallas has seen a race or an access outside a buffer."""
    if "implementation" not in request.fixturenames:
        yield
        return
    captured = request.getfixturevalue("capfd")
    yield
    assert "RACE DETECTED" not in captured.readouterr().out


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for variables in ENVIRONMENT.values():
        for variable in variables:
            monkeypatch.delenv(variable, raising=False)


def pytest_collection_modifyitems(config, items):
    """On a GPU all cases of a test run; without one, those that cover its parameters' values.

    Every pair of values of two parameters that occurs in all of its cases occurs in those that run;
    where kernels are interpreted, every value of each parameter. Neither there nor by XLA run those
    that differ in blocks alone.
    """
    if ON_GPU:
        return
    dropped = {item for item in items if item.get_closest_marker("gpu")}
    groups = {}
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        interpreted = item.get_closest_marker("interpreted") is not None
        has_no_blocks = interpreted or parameters.get("implementation") == "xla"
        if (interpreted and item.get_closest_marker("large")) or (
            has_no_blocks and item.get_closest_marker("blocks")
        ):
            dropped.add(item)
        elif parameters and item not in dropped:
            key = (item.function, parameters.get("implementation"), 1 if interpreted else 2)
            groups.setdefault(key, []).append(item)
    for (*_, together), group in groups.items():
        dropped.update(set(group) - set(_covering(group, together)))
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = [item for item in items if item not in dropped]


def _covering(group, together):
    """Cases with every combination of `together` parameters' values, taken greedily."""

    def combinations(item):
        values = [(name, id(value)) for name, value in item.callspec.params.items()]
        return set(itertools.combinations(values, min(together, len(values))))

    combined = {item: combinations(item) for item in group}
    missing, taken = set().union(*combined.values()), []
    while missing:
        best = max(group, key=lambda item: len(combined[item] & missing))
        taken.append(best)
        missing -= combined[best]
    return taken
