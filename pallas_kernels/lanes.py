"""Vectors in registers: loads, stores and reductions that stay inside their buffers.

Mosaic GPU holds arrays of a multiple of 128 elements, spread over the 128 threads of a warpgroup.
On hardware every such array needs a layout; the interpreter has none.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import streaming

LANES = 128
_UNROLL = 8  # vectors in flight while summing over requests
_SERIAL = 32  # requests up to which adding one by one is faster than a vector and its reduction


def access_width(*pitches: int) -> int:
    """Elements of int32 that one thread may move at once in rows of these pitches: 4, 2 or 1."""
    return math.gcd(4, *pitches)


class Lanes:
    """Vector operations, on hardware or under the interpreter."""

    def __init__(self, interpret: bool):
        self._interpret = interpret

    def laid_out(self, vector: jax.Array, width: int = 1) -> jax.Array:
        """`vector` with `width` neighbouring elements in each thread."""
        if self._interpret:
            return vector
        return plgpu.layout_cast(vector, plgpu.Layout.WG_STRIDED(vector.shape, vec_size=width))

    def load(self, ref, index, width: int = 1) -> jax.Array:
        """A vector from memory."""
        return self.laid_out(ref[index], width)

    def issue(self, scalar: jax.Array) -> None:
        """Has the load of a scalar under way from here on.

        A load that only a branch needs is moved into it by LLVM, where it starts when the condition
        is known: two latencies in a row instead of one.
        """
        if self._interpret:
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT(()),))
        def use(_, value):
            streaming.use(value)

        use(scalar)

    def store(self, ref, index, vector: jax.Array, width: int = 1) -> None:
        """Stores a vector that this kernel does not read again."""
        if self._interpret:
            ref[index] = vector
        else:
            self._inline(streaming.store, width, vector)(ref.at[index], vector)

    def store_some(self, ref, index, vector: jax.Array, count: jax.Array, width: int = 1) -> None:
        """Stores the first elements of a vector, `count` of them, and touches nothing else."""
        left = count - self.iota(vector.size, width)
        if self._interpret:
            ref[index] = jnp.where(left > 0, vector, ref[index])
        else:
            self._inline(streaming.store_some, width, vector, left)(ref.at[index], vector, left)

    def store_pages(
        self, ref, index, columns: jax.Array, start, end, page: int, width: int = 1
    ) -> None:
        """Stores the pages of a table's columns [start, start + columns.size) below `end`.

        A page starts where a column is a multiple of `page`: its number, the column's value divided
        by `page`, goes to `ref[(*index, column // page)]`. At most one starts in an access: `page`
        is a multiple of `width`.
        """
        column = start + self.iota(columns.size, width)
        position = floor_div(column, page)
        starts = (column == position * page) & (column < end)
        pages = floor_div(columns, page)
        if not self._interpret:
            positions = jnp.where(starts, position, -1)
            self._inline(streaming.scatter, width, pages, positions)(
                ref.at[index], pages, positions
            )
            return
        first = lax.div(start + (page - 1), jnp.int32(page))
        for k in range(-(-columns.size // page)):
            here = starts & (position == first + k)

            @pl.when(jnp.sum(here.astype(jnp.int32)) > 0)
            def _(k=k, here=here):
                ref[(*index, first + k)] = jnp.sum(jnp.where(here, pages, 0))

    def _inline(self, store: Callable, width: int, *vectors: jax.Array) -> Callable:
        layouts = [plgpu.Layout.WG_STRIDED(v.shape, vec_size=width) for v in vectors]

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *layouts))
        def inlined(_, memory, *registers):
            store(memory, *registers, width)

        return inlined

    def iota(self, size: int, width: int = 1) -> jax.Array:
        """0, 1, ..., size - 1."""
        return self.laid_out(lax.broadcasted_iota(jnp.int32, (size,), 0), width)

    def zeros(self, size: int, width: int = 1) -> jax.Array:
        """A vector of zeros."""
        return self.laid_out(jnp.zeros((size,), jnp.int32), width)


def floor_div(x: jax.Array, divisor: int) -> jax.Array:
    """`x // divisor`, of vectors and scalars."""
    if divisor & (divisor - 1) == 0:
        return x >> (divisor.bit_length() - 1)
    quotient = lax.div(x, jnp.full_like(x, divisor))
    return quotient - jnp.where(x - quotient * divisor < 0, 1, 0)


def sum_over_requests(
    lanes: Lanes,
    requests: int,
    refs: tuple,
    spill,
    terms: Callable[..., tuple[jax.Array, ...]],
    limit: int | None = None,
) -> tuple[jax.Array, ...]:
    """Sums over all requests, which wrap as int32 does or stop at a limit.

    Args:
      lanes: vector operations.
      requests: the length of each of `refs`.
      refs: int32 [requests] in global memory.
      spill: int32 [len(refs), 128] in shared memory.
      terms: called with the indices of 128 requests, whether each exists, and the 128 values of
        each ref; returns the vectors to add up.
      limit: where sums stop; terms must then be in [0, limit].
    """
    if requests <= _SERIAL:
        values = [[ref[k] for ref in refs] for k in range(requests)]
        added = [terms(jnp.int32(k), True, *v) for k, v in enumerate(values)]
        return functools.reduce(lambda sums, t: _add(sums, t, limit), added)

    whole = requests // LANES
    iota = lanes.iota(LANES)

    def add(sums, first, vectors):
        index = first + iota
        return _add(sums, terms(index, index < requests, *vectors), limit)

    def load(block):
        return [lanes.load(ref, pl.ds(block * LANES, LANES)) for ref in refs]

    def add_unrolled(first_block, blocks, sums):
        loaded = [load(first_block + b) for b in range(blocks)]
        for b, vectors in enumerate(loaded):
            sums = add(sums, (first_block + b) * LANES, vectors)
        return sums

    one = terms(iota, iota < requests, *[iota] * len(refs))
    sums = tuple(lanes.zeros(LANES) for _ in one)
    rounds = whole // _UNROLL
    if rounds:
        sums = lax.fori_loop(
            0, rounds, lambda k, sums: add_unrolled(k * _UNROLL, _UNROLL, sums), sums
        )
    sums = add_unrolled(rounds * _UNROLL, whole % _UNROLL, sums)
    if requests % LANES:
        # Fewer than 128 are left: a vector load would reach past the end.
        for r, ref in enumerate(refs):
            for k in range(requests % LANES):
                spill[r, k] = ref[whole * LANES + k]
        vectors = [lanes.load(spill, (r, pl.ds(0, LANES))) for r in range(len(refs))]
        sums = add(sums, whole * LANES, vectors)
    if limit is None:
        return tuple(jnp.sum(s) for s in sums)
    return tuple(_limited_sum(s, limit) for s in sums)


def _add(sums: tuple, terms: tuple, limit: int | None) -> tuple:
    pairs = zip(sums, terms, strict=True)
    if limit is None:
        return tuple(s + t for s, t in pairs)
    return tuple(jnp.where(s > limit - t, limit, s + t) for s, t in pairs)


def _limited_sum(vector: jax.Array, limit: int) -> jax.Array:
    """min(limit, the sum of 128 nonnegative values), by halves that cannot leave int32."""
    low = jnp.sum(vector & 0xFFFF)
    high = jnp.sum(vector >> 16) + (low >> 16)
    total = (high << 16) | (low & 0xFFFF)
    return jnp.where(high > 0x7FFF, limit, jnp.minimum(total, limit))
