"""What only a GPU can show: exact bounds, 64-bit offsets, launch counts, CUDA graphs, fuzzing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TABLE_MODES, assert_same, inputs, mode_options, pointers

import jaxnsa
from benchmarks.measure import kernel_times
from jaxnsa import ForwardMode, NSAMetadata, reference
from jaxnsa.app import verify
from jaxnsa.implementations import FUSED, IMPLEMENTATIONS

pytestmark = pytest.mark.gpu

CANARY = 0x5A5A5A5A
MARGIN = 64  # words before and after each buffer


def test_fuzz(implementation):
    failing = [
        case
        for case in verify.random_cases(2000, seed=2026, cases_per_shape=25)
        if case.fails(implementation)
    ]
    assert not failing, failing[0].code(implementation)


@pytest.mark.parametrize("mode", TABLE_MODES)
@pytest.mark.parametrize("max_len, page", ((37, 1), (1001, 48), (2048, 64), (4099, 3)))
@pytest.mark.parametrize("tail", ("copy", "zero", "keep"))
def test_nothing_is_written_outside_a_destination(mode, max_len, page, tail, implementation):
    import torch

    seq_lens, indices, pool = inputs(7, pool_cols=max_len, high=max_len + 50)
    options = {"num_backends": 3, "forward_mode": mode, "real_page_size": page}
    options |= mode_options(mode, 7, slack=-2)
    shapes = reference.fused_metadata_precompute_and_broadcast(seq_lens, indices, pool, **options)
    arenas = []

    def guarded(array):
        arena = torch.full((array.size + 2 * MARGIN,), CANARY, dtype=torch.int32, device="cuda")
        arenas.append(arena)
        inside = arena[MARGIN : MARGIN + array.size].view(array.shape)
        return jax.dlpack.from_dlpack(inside)

    out = jax.tree.map(guarded, shapes)
    torch.cuda.synchronize()
    before = pointers(out)
    result = jaxnsa.fused_metadata_precompute_and_broadcast(
        seq_lens, indices, pool, out=out, tail=tail, implementation=implementation, **options
    )
    jax.block_until_ready(result)
    assert pointers(result) == before
    for arena in arenas:
        assert (arena[:MARGIN] == CANARY).all()
        assert (arena[-MARGIN:] == CANARY).all()


def test_offsets_past_32_bits(implementation):
    """A pool and a table of more than 2^31 elements: 8.7 GB each."""
    rows, columns = 16_500, 131_072
    last = jnp.arange(columns, dtype=jnp.int32)
    pool = jnp.zeros((rows, columns), jnp.int32).at[rows - 1].set(last)
    lengths = jnp.ones(rows, jnp.int32).at[rows - 1].set(columns - 5)
    fresh = functools.partial(jnp.full, fill_value=-7, dtype=jnp.int32)
    out = NSAMetadata(
        cache_seqlens=fresh(rows),
        cu_seqlens_k=fresh(rows + 1),
        seqlens_expanded=fresh(rows),
        nsa_cache_seqlens=fresh(rows),
        nsa_cu_seqlens_k=fresh(rows + 1),
        page_indices=fresh((rows, columns)),
        real_page_table=fresh((rows, columns // 64)),
    )
    result = jaxnsa.precompute_decode_metadata(
        lengths, jnp.arange(rows, dtype=jnp.int32), pool, out=out, implementation=implementation
    )
    wide = np.asarray(result.page_indices[rows - 1])
    np.testing.assert_array_equal(wide[: columns - 5], np.arange(columns - 5))
    assert (wide[columns - 5 :] == -7).all()
    np.testing.assert_array_equal(result.page_indices[rows - 2, :3], [0, -7, -7])
    np.testing.assert_array_equal(result.real_page_table[rows - 1], np.arange(columns // 64))


def test_stacked_backends_past_32_bits(implementation):
    """The third backend's keys begin 2^31 elements into an array of 13 GB."""
    keys = 2**30
    result = jaxnsa.fused_metadata_precompute_and_broadcast(
        jnp.array([3, 2]),
        jnp.array([0, 1]),
        jnp.array([[5, 6, 7], [8, 9, 1]], jnp.int32),
        forward_mode=ForwardMode.EXTEND,
        extend_seq_lens=jnp.array([1, 2]),
        max_total_tokens=4,
        max_total_keys=keys,
        real_page_size=2,
        num_backends=3,
        stacked=True,
        tail="zero",
        implementation=implementation,
    ).flat_page_indices
    assert result.shape == (3, keys)
    for backend in range(3):
        np.testing.assert_array_equal(result[backend, :6], [5, 6, 7, 8, 9, 0])
        assert jnp.count_nonzero(result[backend]) == 5


@pytest.mark.parametrize("mode", TABLE_MODES)
@pytest.mark.parametrize("strategy, launches", (("ultra_fast", 1), ("fast", 4), ("fallback", 3)))
@pytest.mark.parametrize("name", FUSED)
def test_launches_of_strategies(name, strategy, launches, mode):
    if reason := IMPLEMENTATIONS[name].unavailable("gpu"):
        pytest.skip(f"runs where {name} does: {reason}")
    seq_lens, indices, pool = (jnp.asarray(a) for a in inputs(7, pool_cols=512))
    options = jax.tree.map(
        lambda v: jnp.asarray(v) if isinstance(v, np.ndarray) else v, mode_options(mode, 7)
    )
    compute = functools.partial(
        jaxnsa.fused_metadata_precompute_and_broadcast,
        seq_lens,
        indices,
        pool,
        num_backends=3,
        forward_mode=mode,
        strategy=strategy,
        implementation=name,
        **options,
    )
    state = [compute()]

    def step():
        state[0] = compute(out=state[0])
        return state[0]

    assert sum(kernel.launches for kernel in kernel_times(step, calls=10)) == launches


def test_xla_captures_ffi_calls_in_a_cuda_graph(tmp_path):
    x = jnp.arange(100, dtype=jnp.int32)

    @jax.jit
    def several(x):
        for _ in range(8):
            x = jaxnsa.prefix_sum(x, implementation="ffi")[1:]
        return x

    expected = np.arange(100)
    for _ in range(8):
        expected = np.cumsum(expected)
    np.testing.assert_array_equal(several(x), expected.astype(np.int32))
    with jax.profiler.trace(str(tmp_path)):
        np.testing.assert_array_equal(several(x + 0), expected.astype(np.int32))
    (path,) = tmp_path.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = {event.name for plane in planes for line in plane.lines for event in line.events}
    assert any("command_buffer::execute" in name for name in events)


@pytest.mark.parametrize("bs, fused", ((767, "pallas"), (768, "ffi")))
def test_the_default_of_many_requests(bs, fused):
    if reason := IMPLEMENTATIONS[fused].unavailable("gpu"):
        pytest.skip(f"runs where {fused} does: {reason}")
    arguments = tuple(jnp.asarray(array) for array in inputs(bs, pool_cols=512))
    options = {"num_backends": 2, "real_page_size": 64}
    out = jaxnsa.fused_metadata_precompute_and_broadcast(*arguments, **options)
    expected = reference.fused_metadata_precompute_and_broadcast(*arguments, **options)
    before = pointers(out)
    step = jax.jit(
        lambda out, *arguments: jaxnsa.fused_metadata_precompute_and_broadcast(
            *arguments, out=out, **options
        ),
        donate_argnums=0,
    )
    text = step.lower(out, *arguments).as_text()
    assert ("jaxnsa_fused_metadata" in text) == (fused == "ffi")
    out = step(out, *arguments)
    assert pointers(out) == before
    assert_same(out, expected)
