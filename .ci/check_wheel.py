"""Checks a wheel: it holds the CPU library, which runs on any Linux of the last years."""

import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13)}
"""The newest symbols that manylinux_2_34 has: of RHEL 9, Ubuntu 22.04, Debian 12."""
PROGRAM = """
import sys, jax.numpy as jnp, jaxnsa
assert not {"click", "rich", "jaxnsa.app"} & sys.modules.keys()
assert jaxnsa.get_kernel_info()["default"] == "ffi"
assert jaxnsa.prefix_sum(jnp.arange(3)).tolist() == [0, 0, 1, 3]
"""


def check_symbols(library: bytes) -> None:
    """No symbol of a newer C or C++ runtime."""
    for runtime, newest in NEWEST.items():
        pattern = rb"\0%s_([0-9.]+)(?=\0)" % runtime.encode()
        for number in re.findall(pattern, library):
            version = tuple(map(int, number.split(b".")))
            assert version <= newest, f"{runtime}: got {version}, expected at most {newest}"


def main(wheel: Path) -> None:
    """Looks into the wheel, then installs it where there is no compiler and runs it."""
    with zipfile.ZipFile(wheel) as content:
        libraries = [name for name in content.namelist() if name.endswith(".so")]
        assert any("jaxnsa_cpu" in name for name in libraries), "no library for the CPU"
        for library in libraries:
            check_symbols(content.read(library))
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        install = [python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", str(wheel)]
        subprocess.run(install, check=True, env={"PATH": f"{folder}/bin"})
        subprocess.run([python, "-c", PROGRAM], check=True, cwd=folder, env={"PATH": ""})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
