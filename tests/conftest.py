import os

# Before the first import of JAX: eight simulated devices for shard_map.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import pytest

from jaxnsa.config import ENVIRONMENT
from jaxnsa.implementations import IMPLEMENTATIONS

ON_GPU = jax.default_backend() == "gpu"
HERE = [
    pytest.param(name, marks=[pytest.mark.gpu] if ON_GPU else [])
    for name, module in IMPLEMENTATIONS.items()
    if module.unavailable(jax.default_backend()) is None
]


def pytest_collection_modifyitems(config, items):
    if ON_GPU:
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture(params=HERE, scope="module")
def implementation(request):
    """Every implementation that can run on this machine; on one with a GPU, marked gpu."""
    return request.param


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for variables in ENVIRONMENT.values():
        for variable in variables:
            monkeypatch.delenv(variable, raising=False)
