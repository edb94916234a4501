"""Vectors in registers: loads, stores and reductions that stay inside their buffers.

Mosaic GPU holds arrays of a multiple of 128 elements, spread over the 128 threads of a warpgroup.
On hardware every such array needs a layout; the interpreter has none.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ptx

LANES = 128
_LAYOUT = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
_HELD = plgpu.ShapeDtypeStruct((LANES,), jnp.int32, layout=_LAYOUT)
Scalar = jax.Array | int
_SCALAR = plgpu.Layout.WG_SPLAT(())
_SPLAT = plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR)
_UNROLL = 8  # vectors in flight while summing over requests


def access_width(*strides: int) -> int:
    """Elements of int32 that one thread may move at once in rows of these strides: 4, 2 or 1."""
    return math.gcd(4, *strides)


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

    def load_first(self, ref, start: Scalar, count: Scalar, stride: int = 1) -> jax.Array:
        """At most `count` of 128 elements of a vector from `start` on, and 0 behind them.

        With a stride, elements `start * stride`, `(start + 1) * stride` and so on.
        """
        if self._interpret:
            if isinstance(count, int):
                return jnp.pad(ref[pl.ds(start * stride, count, stride)], (0, LANES - count))
            vector = jnp.zeros(LANES, jnp.int32)
            for is_part, first, size in _parts(count, ref):
                vector = lax.cond(
                    is_part,
                    lambda v, first, size=size: lax.dynamic_update_slice(
                        v, ref[pl.ds((start + first) * stride, size, stride)], (first,)
                    ),
                    lambda v, first: v,
                    vector,
                    first,
                )
            return vector

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _SCALAR, _SCALAR), return_type=_HELD)
        def load(_, memory, start, count):
            return ptx.load_first(memory, start, count, stride)

        return load(ref, jnp.int32(start), jnp.int32(count))

    def store_first(self, ref, start: Scalar, vector: jax.Array, count: Scalar) -> None:
        """Stores at most the first `count` of 128 elements from `start` on, and nothing else."""
        if self._interpret:
            if isinstance(count, int):
                ref[pl.ds(start, count)] = vector[:count]
                return
            for is_part, first, size in _parts(count, ref):

                @pl.when(is_part)
                def _(first=first, size=size):
                    part = lax.dynamic_slice(vector, (first,), (size,))
                    ref[pl.ds(start + first, size)] = part

            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _LAYOUT, _SCALAR, _SCALAR))
        def store(_, memory, registers, start, count):
            ptx.store_first(memory, registers, start, count)

        store(ref, vector, jnp.int32(start), jnp.int32(count))

    def sums(self, scratch, *vectors: jax.Array) -> list[jax.Array]:
        """The sum of each of several vectors of 128 elements; wraps as int32 does.

        Args:
          scratch: int32 [128] in shared memory.
          vectors: at most 32 of them.
        """
        if self._interpret:
            return [jnp.sum(v, dtype=jnp.int32) for v in vectors]

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), *[_LAYOUT] * len(vectors)),
            return_type=[_SPLAT] * len(vectors),
        )
        def add_up(_, memory, *addends):
            return ptx.sums(memory, *addends)

        return add_up(scratch, *vectors)

    def any(self, vector: jax.Array) -> jax.Array:
        """Whether one of 128 truth values is true, a scalar."""
        if self._interpret:
            return jnp.any(vector)

        @plgpu.inline_mgpu(arg_types=(_LAYOUT,), return_type=_SPLAT)
        def any_of(_, vector):
            return ptx.any_of(vector)

        return any_of(self.laid_out(jnp.where(vector, 1, 0))) != 0

    def exclusive_sums(self, scratch, *vectors: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """Of vectors of 128 elements, the sums before each element and in all.

        They wrap as int32 does; `scratch` as in `sums`.
        """
        if self._interpret:
            sums = [jnp.cumsum(v, dtype=jnp.int32) for v in vectors]
            return [(s - v, s[-1]) for s, v in zip(sums, vectors, strict=True)]
        return self._scan("add", scratch, vectors)

    def exclusive_maximum(self, scratch, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The greatest before each of 128 elements, none of them negative, 0 before the first.

        And the greatest of all; `scratch` as in `sums`.
        """
        if self._interpret:
            greatest = lax.cummax(vector)
            return jnp.pad(greatest[:-1], (1, 0)), greatest[-1]
        ((before, greatest),) = self._scan("max", scratch, [vector])
        return before, greatest

    def _scan(
        self, operation: str, scratch, vectors: Sequence[jax.Array]
    ) -> list[tuple[jax.Array, jax.Array]]:
        count = len(vectors)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), *[_LAYOUT] * count), return_type=[_HELD, _SPLAT] * count
        )
        def scan(_, memory, *vectors):
            return ptx.exclusive_scan(operation, memory, *vectors)

        results = scan(scratch, *map(self.laid_out, vectors))
        return list(zip(results[::2], results[1::2], strict=True))

    def gather(self, ref, *indices: jax.Array) -> list[jax.Array]:
        """The elements of a vector in memory at 128 indices each, none of them outside it."""
        if self._interpret:
            whole = ref[...]
            return [whole[index] for index in indices]

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _LAYOUT), return_type=_HELD)
        def gather(_, memory, index):
            return ptx.gather(memory, index)

        return [gather(ref, self.laid_out(index)) for index in indices]

    def scatter(self, ref, *pairs: tuple[jax.Array, jax.Array]) -> None:
        """Stores 128 elements at indices of a vector in shared memory, of each (indices, elements).

        None of them are outside it.
        """
        if self._interpret:
            whole = ref[...]
            for index, vector in pairs:
                whole = whole.at[index].set(vector)
            ref[...] = whole
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _LAYOUT, _LAYOUT))
        def scatter(_, memory, index, vector):
            ptx.scatter(memory, index, vector)

        for pair in pairs:
            scatter(ref, *map(self.laid_out, pair))

    def store_rows(self, ref, lead: tuple, rows: jax.Array, *columns: jax.Array) -> None:
        """Stores rows of `ref[lead]`, each as many elements as there are columns.

        Lane k stores `columns[:][k]` in row `rows[k]`, and nothing where that is negative. No other
        block may write to the array.
        """
        if self._interpret:
            whole = ref[(*lead, ...)]
            held = whole.reshape(-1, len(columns))
            places = jnp.where(rows < 0, len(held), rows)
            held = held.at[places].set(jnp.stack(columns, axis=-1), mode="drop")
            ref[(*lead, ...)] = held.reshape(whole.shape)
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[_LAYOUT] * (1 + len(columns))))
        def store(_, memory, rows, *columns):
            ptx.store_rows(memory, rows, *columns)

        store(ref.at[lead] if lead else ref, *map(self.laid_out, (rows, *columns)))

    def start_load(self, scalar: jax.Array) -> None:
        """Starts the load of a scalar here, and not in the branch that needs it.

        LLVM moves a load that only one branch needs into that branch, where it starts when the
        condition is known: two latencies in a row instead of one. An empty instruction that takes
        the scalar as its operand keeps the load where it is.
        """
        if self._interpret:
            return

        @plgpu.inline_mgpu(arg_types=(_SCALAR,))
        def use(_, value):
            ptx.use(value)

        use(scalar)

    def store(self, ref, index, vector: jax.Array, width: int = 1) -> None:
        """Stores a vector that this kernel does not read again."""
        if self._interpret:
            ref[index] = vector
        else:
            self._inline(ptx.store, width, vector)(ref.at[index], vector)

    def store_part(self, ref, index, vector: jax.Array, start, first, end, width: int = 1) -> None:
        """Stores columns [first, end) of a vector that begins at column `start`, no others.

        Where `first` is None, from `start` on.
        """
        column = start + self.iota(vector.size, width)
        if self._interpret:
            is_stored = (column < end) & (column >= (start if first is None else first))
            ref[index] = jnp.where(is_stored, vector, ref[index])
            return
        bounds = [end - column, *([] if first is None else [first - column])]
        store = self._inline(ptx.store_part, width, vector, *bounds)
        store(ref.at[index], vector, *bounds)

    def _inline(self, store: Callable, width: int, *vectors: jax.Array) -> Callable:
        layouts = [plgpu.Layout.WG_STRIDED(v.shape, vec_size=width) for v in vectors]

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *layouts))
        def inlined(_, memory, *registers):
            store(memory, *registers, width=width)

        return inlined

    def iota(self, size: int, width: int = 1) -> jax.Array:
        """0, 1, ..., size - 1."""
        return self.laid_out(lax.broadcasted_iota(jnp.int32, (size,), 0), width)

    def repeat(self, count: int, body: Callable, carry: Any) -> Any:
        """`carry = body(k, carry)` for k = 0 ... count - 1, in a loop.

        Compilers would write out a short one: its instructions take longer to arrive than to run,
        and its registers cost the blocks of the tables occupancy.
        """
        if count == 1:
            return body(0, carry)
        if self._interpret:
            return lax.fori_loop(0, count, body, carry)

        @plgpu.inline_mgpu(return_type=_SPLAT)
        def end(_):
            return ptx.end_of_loop(count)

        def step(state: tuple) -> tuple:
            k, _, carry = state
            return k + 1, end(), body(k, carry)

        start = (jnp.int32(0), jnp.int32(count), carry)
        return lax.while_loop(lambda state: state[0] < state[1], step, start)[2]

    def for_neighbours(self, count: int, body: Callable, carry: Any) -> Any:
        """`carry = body(indices, carry)` with vectors that have each of 0 ... count - 1 once.

        A thread has neighbours, as many as any other: the last ones go past the end.
        """
        size = -(-count // LANES)
        first = self.iota(LANES) * size
        return self.repeat(size, lambda k, carry: body(first + k, carry), carry)

    def zeros(self, size: int, width: int = 1) -> jax.Array:
        """A vector of zeros."""
        return self.laid_out(jnp.zeros((size,), jnp.int32), width)

    def select(self, condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        """One of two vectors of 128 elements, `x` where a scalar is true.

        Mosaic GPU of jax 0.11 selects by vectors of truth values alone.
        """
        return jnp.where(self.zeros(LANES) + jnp.where(condition, 1, 0) > 0, x, y)


def power_of_2(exponent: Scalar) -> jax.Array:
    """2 to that power."""
    return lax.shift_left(jnp.int32(1), jnp.int32(exponent))


def ceil_div(x: jax.Array, divisor: int) -> jax.Array:
    """`x / divisor`, rounded up, of scalars that are not negative; never past int32."""
    return x if divisor == 1 else floor_div(x - 1, divisor) + 1


def _parts(count: jax.Array, ref) -> list[tuple[jax.Array, jax.Array, int]]:
    """[0, count), at most 128, in parts of static sizes: whether each is one, its start, its size.

    The interpreter has no access of a size that is not static.
    """
    count = jnp.clip(count, 0, LANES)
    sizes = [1 << bit for bit in reversed(range(LANES.bit_length())) if 1 << bit <= ref.shape[-1]]
    return [((count & size) > 0, count & -(2 * size), size) for size in sizes]


def floor_div(x: jax.Array, divisor: int) -> jax.Array:
    """`x // divisor`, of vectors and scalars."""
    if divisor & (divisor - 1) == 0:
        return x >> (divisor.bit_length() - 1)
    quotient = lax.div(x, jnp.full_like(x, divisor))
    return quotient - jnp.where(x - quotient * divisor < 0, 1, 0)


def start_sums(
    lanes: Lanes,
    requests: int,
    refs: tuple,
    scratch,
    terms: Callable[..., tuple[jax.Array, ...]],
    limit: int | None = None,
) -> Callable[[], list[jax.Array]]:
    """Starts to load what is summed over all requests; the result, called, returns the sums.

    They wrap as int32 does or stop at a limit.

    Args:
      lanes: vector operations.
      requests: the length of each of `refs`, at least 1.
      refs: int32 [requests] in global memory.
      scratch: int32 [128] in shared memory.
      terms: called with the indices of 128 requests, whether each exists, and the 128 values of
        each ref; returns the vectors to add up.
      limit: where sums stop; terms must then be in [0, limit].
    """
    iota = lanes.iota(LANES)
    whole, rest = divmod(requests - 1, LANES)

    def of_block(first, vectors):
        index = first + iota
        return terms(index, index < requests, *vectors)

    def add_blocks(first_block, blocks, sums):
        starts = [(first_block + b) * LANES for b in range(blocks)]
        loaded = [[lanes.load(ref, pl.ds(start, LANES)) for ref in refs] for start in starts]
        for start, vectors in zip(starts, loaded, strict=True):
            sums = _add(sums, of_block(start, vectors), limit)
        return sums

    # The last block may be shorter than a vector.
    last = [lanes.load_first(ref, whole * LANES, rest + 1) for ref in refs]

    def wait() -> list[jax.Array]:
        sums = of_block(whole * LANES, last)
        rounds = whole // _UNROLL
        if rounds:
            sums = lax.fori_loop(
                0, rounds, lambda k, sums: add_blocks(k * _UNROLL, _UNROLL, sums), sums
            )
        sums = add_blocks(rounds * _UNROLL, whole % _UNROLL, sums)
        if limit is None:
            return lanes.sums(scratch, *sums)
        # By halves, which cannot leave int32.
        halves = [half for s in sums for half in (s & 0xFFFF, s >> 16)]
        added = lanes.sums(scratch, *halves)
        pairs = zip(added[::2], added[1::2], strict=True)
        return [_limited(low, high, limit) for low, high in pairs]

    return wait


def _add(sums: tuple, terms: tuple, limit: int | None) -> tuple:
    pairs = zip(sums, terms, strict=True)
    if limit is None:
        return tuple(s + t for s, t in pairs)
    return tuple(jnp.where(s > limit - t, limit, s + t) for s, t in pairs)


def _limited(low: jax.Array, high: jax.Array, limit: int) -> jax.Array:
    """min(limit, (high << 16) + low)."""
    high = high + (low >> 16)
    total = (high << 16) | (low & 0xFFFF)
    return jnp.where(high > 0x7FFF, limit, jnp.minimum(total, limit))
