"""The Triton kernels without a GPU: compiled to PTX, and lowered for CUDA."""

import functools
import importlib
import os
import subprocess
import sys
from typing import Any, NamedTuple

import interpreted
import jax
import jax.numpy as jnp
import pytest
from helpers import (
    assert_same,
    held,
    inputs,
    lowered_operations,
    on_device,
    skip_where_it_is_not_lowered,
)
from interpreted import TRITON

import jaxnsa
from jaxnsa import ForwardMode, reference
from jaxnsa.implementations import triton
from jaxnsa.metadata import FIELDS, Extent, Field, NSAMetadata
from jaxnsa.spec import Inputs, Rows, Spec

compiler = pytest.importorskip(
    "triton.compiler", reason="runs where the extra jaxnsa[triton] is installed"
)

NAME = {"implementation": "triton"}


@pytest.mark.skipif(bool(interpreted.NAMES[TRITON]), reason=str(interpreted.NAMES[TRITON]))
@pytest.mark.parametrize("programs", (1, 4, 100))
def test_programs_stride_over_tiles(programs):
    """More tiles than programs: the same with any block sizes."""
    from jaxnsa.implementations import triton_kernels

    lengths, indices, pool = inputs(2, pool_cols=700)
    out = held(reference.precompute_decode_metadata(lengths, indices, pool))
    expected = reference.precompute_decode_metadata(
        lengths, indices, pool, nsa_index_topk=64, tail="keep", out=held(out)
    )
    (result,) = interpreted.triton_kernels().fused_metadata(
        Inputs(*on_device((lengths, indices, pool)), None),
        (on_device(out),),
        spec=Spec(Rows.of(ForwardMode.DECODE, 2), 700, 64, 64, True, "keep"),
        config=triton_kernels.BlockConfig(tile=64, programs=programs),
    )
    assert_same(result, expected)


@pytest.fixture(params=(80, 90))
def compiled(request, monkeypatch, tmp_path):
    """Kernels are compiled for a GPU that is not there; their PTX by name."""
    from triton.backends.compiler import GPUTarget

    from jaxnsa.implementations.triton_kernels import launch

    texts = {}

    def compile(signature, shapes, *arrays, programs, warps, sizes, constants):
        del programs
        entry = launch.entry(signature)
        pointers = ["*i32"] * (signature.inputs.num_leaves + len(shapes))
        types = ["i32"] * len(sizes) + pointers + ["constexpr"] * len(constants)
        aligned = {(len(sizes) + k,): [["tt.divisibility", 16]] for k in range(len(pointers))}
        source = compiler.ASTSource(
            entry,
            dict(zip(entry.arg_names, types, strict=True)),
            constexprs=constants,
            attrs=aligned,
        )
        target = GPUTarget("cuda", request.param, 32)
        binary = compiler.compile(source, target=target, options={"num_warps": warps})
        ptx = binary.asm["ptx"]
        assert f".target sm_{request.param}" in ptx
        assert binary.asm["cubin"]
        texts[signature.kernel.__name__] = ptx
        return [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]

    monkeypatch.setattr(launch, "_call", compile)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return texts


def fused_metadata(mode, *, max_len=64, tail="copy"):
    """Compiles the kernel for three backends."""
    from jaxnsa.implementations import triton_kernels

    lengths = jnp.ones(7, jnp.int32)
    rows = Rows.of(mode, 7, num_draft_tokens=3, max_total_tokens=14)
    return triton_kernels.fused_metadata(
        Inputs(
            lengths,
            lengths,
            jnp.zeros((8, 4096), jnp.int32),
            lengths if mode is ForwardMode.DRAFT_EXTEND else None,
        ),
        None,
        Spec(rows, max_len, 2048, 64, True, tail, num_backends=3),
    )


@pytest.mark.parametrize(
    "compiled, mode, tail, max_len, width",
    [
        (90, ForwardMode.DECODE, "copy", 4096, "v4.b32"),
        (80, ForwardMode.TARGET_VERIFY, "zero", 4095, "b32"),
        (90, ForwardMode.DRAFT_EXTEND, "keep", 4096, "v4.b32"),
    ],
    indirect=["compiled"],
)
def test_the_whole_computation_compiles_to_ptx(compiled, mode, tail, max_len, width):
    fused_metadata(mode, max_len=max_len, tail=tail)
    ptx = compiled["_fused_metadata"]
    assert "ld.global.v4.b32" in ptx
    assert f"st.global.cs.{width}" in ptx


@pytest.mark.parametrize("compiled", (80,), indirect=True)
def test_the_other_functions_compile_to_ptx(compiled):
    from jaxnsa.implementations import triton_kernels

    lengths, table = jnp.ones(7, jnp.int32), jnp.ones((7, 64), jnp.int32)
    src = NSAMetadata(lengths, lengths, lengths, lengths, lengths, table)
    spec = Spec(Rows.of(ForwardMode.DECODE, 7), 64, 2048, 1, True, "keep")
    triton_kernels.prefix_sum(lengths)
    triton_kernels.fill_draft_extend_metadata(
        lengths, lengths, nsa_index_topk=3, max_total_tokens=9
    )
    for live in (None, spec):
        triton_kernels.copy(src, None, num_backends=2, live=live)
        assert "st.global.cs.v4.b32" in compiled.pop("_copy")
    assert set(compiled) == {"_prefix_sum", "_fill_draft_extend_metadata"}


@pytest.mark.parametrize("extent", Extent)
def test_a_forgotten_field_is_an_error(extent, monkeypatch):
    """A field that is described, and that no kernel has a value for."""
    tokens_per_column = 1 if extent is Extent.TABLE else None
    forgotten = Field("forgotten", extent, None, tokens_per_column, None)
    monkeypatch.setitem(FIELDS, "forgotten", forgotten)
    with pytest.raises(NotImplementedError, match=r"the kernel does not write \['forgotten'\]"):
        fused_metadata(ForwardMode.DECODE)


def test_an_array_without_its_value_is_not_compiled(monkeypatch, compiled):
    """A field whose arrays the kernel has, and that `row_values` computes nothing for."""
    kernel = importlib.import_module("jaxnsa.implementations.triton_kernels.fused_metadata")
    forgotten = Field("forgotten", Extent.ROWS, None, None, None)
    monkeypatch.setitem(FIELDS, "forgotten", forgotten)
    fields = dict.fromkeys([*kernel.RowValues._fields, "forgotten"], Any)
    monkeypatch.setattr(kernel, "RowValues", NamedTuple("RowValues", fields.items()))
    with pytest.raises(compiler.CompilationError):
        fused_metadata(ForwardMode.DECODE)


@pytest.fixture
def lowers():
    skip_where_it_is_not_lowered("triton")


def test_without_the_cuda_plugin(monkeypatch):
    from jaxnsa.implementations.triton_kernels import launch

    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="JAX's CUDA plugin is not installed"):
        launch.import_jax_triton.__wrapped__()


@pytest.mark.parametrize("directory", (None, "/somewhere"))
def test_other_users_of_triton_keep_their_cache(directory, lowers):
    code = """
import os
from jaxnsa.implementations import triton
assert triton._import_error() is None
print(os.environ.get("TRITON_CACHE_DIR"))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_CACHE_DIR"}
    if directory:
        environment["TRITON_CACHE_DIR"] = directory
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(directory)


def test_a_batch_of_the_same_power_of_two_is_not_compiled_again(lowers):
    import jax_triton

    library = jax_triton.triton_lib
    cache = getattr(library, "_COMPILED_KERNEL_CACHE", None)
    if cache is None:
        pytest.skip("runs with jax-triton 0.3, whose cache of kernels can be counted")

    def compute(bs, max_len):
        call = functools.partial(jaxnsa.precompute_decode_metadata, max_len=max_len, **NAME)
        lowered_operations(call, *inputs(bs, pool_cols=4096))

    compute(17, 2048)
    before = len(cache)
    compute(31, 2048)
    compute(25, 3000)
    assert len(cache) == before
    compute(33, 2048)
    assert len(cache) == before + 1


def test_vmap_in_place_is_refused(lowers):
    arguments = inputs(3, pool_cols=200)
    out = jaxnsa.precompute_decode_metadata(*arguments)
    batch = jax.tree.map(lambda array: array[None], (arguments, out))
    with pytest.raises(NotImplementedError, match="call without out="):
        jax.vmap(lambda a, out: jaxnsa.precompute_decode_metadata(*a, out=out, **NAME))(*batch)


def test_unavailable_on_the_cpu_says_what_it_needs():
    if jax.default_backend() != "cpu":
        pytest.skip("runs on a machine without a GPU")
    with pytest.raises(
        jaxnsa.ImplementationUnavailableError,
        match=r"'triton' cannot run here: needs an NVIDIA GPU of compute capability 8.0 \(Ampere\)",
    ):
        jaxnsa.prefix_sum(jnp.arange(3), **NAME)


def test_the_interpreter_needs_torch(monkeypatch):
    monkeypatch.setattr(triton, "_missing", list)
    monkeypatch.setattr(triton, "_interpreted", lambda: True)
    for torch in (True, False):
        triton._interpreter_missing.cache_clear()
        monkeypatch.setattr(triton, "_installed", lambda package, torch=torch: torch)
        for platform in ("cpu", "gpu"):
            reason = triton.unavailable(platform)
            assert (reason is None) == torch
            assert torch or "interpreter needs PyTorch" in reason
    monkeypatch.setattr(triton, "_installed", lambda package: True)
    monkeypatch.setattr(triton.importlib.metadata, "version", lambda package: "3.8.1")
    triton._interpreter_missing.cache_clear()
    assert "install Triton 3.9" in triton.unavailable("cpu")
    triton._interpreter_missing.cache_clear()


def test_without_jax_triton_another_implementation_runs(monkeypatch):
    monkeypatch.setattr(triton, "_missing", lambda: ["jax_triton"])
    with pytest.raises(
        jaxnsa.ImplementationUnavailableError,
        match="jax_triton not installed; run: pip install jax-triton",
    ):
        jaxnsa.prefix_sum(jnp.arange(3), **NAME)
    assert jaxnsa.prefix_sum(jnp.arange(3), implementation=("triton", "xla")).tolist() == [
        0,
        0,
        1,
        3,
    ]
    assert jaxnsa.get_kernel_info()["implementations"]["triton"]["version"] is None
