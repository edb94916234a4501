"""What messages tell a reader to install is there to be installed."""

import importlib.metadata
import json
import re
import shlex
import tomllib
import types
from pathlib import Path

import pytest

from jaxnsa.implementations import native_library

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
KNOWN = {
    re.match(r"[\w-]+", requirement).group()
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for requirement in group
}


def advised():
    """Requirements that messages name, with the files that name them."""
    for path in sorted((ROOT / "jaxnsa").rglob("*.py")):
        # Strings that are written in several parts are one.
        text = re.sub(r'"\s*\n\s*f?"', "", path.read_text())
        for found in re.findall(r"\binstall ([a-z][\w-]*(?:\[\w+\])?)[ \"]", text):
            yield path.name, found


@pytest.mark.parametrize("file, requirement", sorted(set(advised())))
def test_what_messages_install_exists(file, requirement):
    name, extra = re.fullmatch(r"([\w-]+)(?:\[(\w+)\])?", requirement).groups()
    assert name in KNOWN
    if extra is not None:
        assert extra in importlib.metadata.metadata(name).get_all("Provides-Extra")


def test_messages_are_found():
    names = {requirement for _, requirement in advised()}
    assert names == {"hypothesis", "jax-triton", "jax[cuda13]", "matplotlib", "torch"}


def test_jax_triton_brings_triton():
    try:
        requirements = importlib.metadata.requires("jax-triton")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs where jax-triton is, as the extra test brings it")
    assert any(re.match(r"triton\b", requirement) for requirement in requirements)


@pytest.mark.parametrize("has_sources", (True, False, None))
def test_the_library_is_rebuilt_from_where_it_was_installed(has_sources, monkeypatch, tmp_path):
    sources = tmp_path / "with a space"
    sources.mkdir()
    if has_sources:
        (sources / "pyproject.toml").touch()
    origin = None if has_sources is None else json.dumps({"url": sources.as_uri()})
    distribution = types.SimpleNamespace(read_text=lambda name: origin)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)
    *command, path = shlex.split(native_library.how_to_rebuild())
    assert command == ["pip", "install", "--force-reinstall", "--no-deps"]
    assert path == (str(sources) if has_sources else "PATH_TO_JAXNSA")
