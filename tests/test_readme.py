"""The README: its examples run, its commands are those that .ci/run runs."""

import re
from pathlib import Path

import jax
import pytest
from helpers import skip_without_library

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


def blocks(language):
    return [code for name, code in BLOCKS if name == language]


def test_every_block_is_python_or_a_command():
    assert {name for name, _ in BLOCKS} == {"python", "sh"}
    check = (ROOT / ".ci" / "run").read_text()
    for command, end in zip(blocks("sh"), ("jaxnsa demo", "pytest"), strict=True):
        assert command.endswith(f"{end}\n")
        assert f"grep -m 1 '{end}$' README.md" in check


def test_python_blocks_run_in_order():
    namespace = {}
    for code in blocks("python"):
        if "import torch" not in code:
            exec(code, namespace)
    assert isinstance(namespace["metadata"].cache_seqlens, jax.Array)


def test_the_pytorch_example_runs():
    pytest.importorskip("torch", reason="runs where PyTorch is, as .ci/run installs it")
    skip_without_library()
    (code,) = [code for code in blocks("python") if "import torch" in code]
    exec(code, {})
