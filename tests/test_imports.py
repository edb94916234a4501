"""Each floor imports only what is below it; CONTRIBUTING.md has the map."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    ("jaxnsa.app",),
    ("jaxnsa.interop",),
    ("jaxnsa.ragged_paged_attention", "jaxnsa.batch_tracker"),
    ("jaxnsa.operations", "jaxnsa.checked_calls", "jaxnsa.computation", "jaxnsa.strategies"),
    ("jaxnsa.implementations",),
    (
        "jaxnsa.argument_checks",
        "jaxnsa.value_checks",
        "jaxnsa.reference",
        "jaxnsa.reference_schedules",
        "jaxnsa.constant_schedules",
        "jaxnsa.row_owners",
    ),
    (
        "jaxnsa.compilation",
        "jaxnsa.config",
        "jaxnsa.spec",
        "jaxnsa.metadata",
        "jaxnsa.schedules",
        "jaxnsa.scalar_checks",
    ),
)
MODULES = sorted(p for name in ("jaxnsa", "pallas_kernels") for p in (ROOT / name).rglob("*.py"))


def imported(path):
    """Modules of this project that a file imports, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def floor(module):
    """How far up a module is; None for what is on no floor."""
    names = [(name, k) for k, names in enumerate(reversed(FLOORS)) for name in names]
    found = [k for name, k in names if module == name or module.startswith(name + ".")]
    return found[0] if found else None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_floors(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    names = list(imported(path))
    if name.startswith("pallas_kernels"):
        own = {n for n in names if n.split(".")[0] == "jaxnsa"}
        assert all(n.startswith(("jaxnsa.spec", "jaxnsa.metadata")) for n in own), own
    elif name != "jaxnsa":
        here = floor(name)
        assert here is not None, "this module is on no floor of FLOORS"
        above = {n for n in names if (floor(n) or 0) > here}
        assert not above
        assert not {n for n in names if n.split(".")[0] in ("tests", "benchmarks")}


def test_what_jax_does_not_promise_is_in_three_files():
    users = [
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        for name in imported(path)
        if name.startswith(("jax._src", "jaxlib", "jax.experimental.mosaic", "jax.interpreters"))
    ]
    assert set(users) == {
        "pallas_kernels/jax_internals.py",
        "jaxnsa/implementations/lowering.py",
        "jaxnsa/implementations/portable.py",
    }
    assert ",<" in (ROOT / "pyproject.toml").read_text().split('dependencies = ["jax')[1][:20]


def test_the_library_leaves_its_programs_alone():
    program = "import jaxnsa, sys; print(sorted({'click', 'rich', 'jaxnsa.app'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
