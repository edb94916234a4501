"""The README: its examples run, its commands work on a fresh copy."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)


def blocks(language):
    return [code for name, code in BLOCKS if name == language]


def test_every_block_is_python_or_a_command():
    assert {name for name, _ in BLOCKS} == {"python", "sh"}
    demo, tests = blocks("sh")
    assert demo.endswith("jaxnsa demo\n")
    # .ci/run takes this line from the README, so running the tests is running it.
    assert tests.endswith("pytest\n")
    assert "grep -m 1 'pytest$' README.md" in (ROOT / ".ci" / "run").read_text()


def test_python_blocks_run_in_order():
    namespace = {}
    for code in blocks("python"):
        if "import torch" not in code:
            exec(code, namespace)
    assert isinstance(namespace["metadata"].cache_seqlens, jax.Array)


def test_the_pytorch_example_runs():
    pytest.importorskip("torch", reason="runs where PyTorch is, as .ci/run installs it")
    (code,) = [code for code in blocks("python") if "import torch" in code]
    exec(code, {})


@pytest.mark.network
def test_demo_command_on_a_fresh_copy(tmp_path):
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", ".*_cache")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    # Nor anything but Python: with a compiler is how this jaxnsa was installed.
    environment = os.environ | {"CXX": "false", "PIP_NO_COMPILE": "1"}
    done = subprocess.run(
        ["bash", "-c", blocks("sh")[0]],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"│ *0 │\s*$", done.stdout, re.M), done.stdout
