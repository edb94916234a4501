"""PTX that Pallas has no name for, as functions for `plgpu.inline_mgpu`.

Loads and stores of some of a vector's elements, and sums that all warps exchange at once. A launch
writes every destination once and reads none of them, so lines that it wrote are the first that the
L2 cache can do without: stores are `st.global.cs`.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pallas_kernels.jax_internals import arith, ir, llvm, mgpu, vector

_WARPS = 4  # of a warpgroup
_WARP_SUM = "redux.sync.add.s32 $0, $1, 0xffffffff;"


def store(memory: ir.Value, registers: mgpu.FragmentedArray, width: int) -> None:
    """Stores an int32 array to global memory.

    Args:
      memory: memref of the shape of the array.
      registers: the array, with `width` neighbouring elements in each access.
      width: 1, 2 or 4.
    """
    for pointer, values in _accesses(memory, registers, width):
        _assembly(_instruction(width), pointer, *values)


def store_part(
    memory: ir.Value,
    registers: mgpu.FragmentedArray,
    left: mgpu.FragmentedArray,
    skipped: mgpu.FragmentedArray | None = None,
    *,
    width: int,
) -> None:
    """Stores some elements of an int32 array to global memory, and touches nothing else.

    Args:
      memory: memref of the shape of the array.
      registers: the array, with `width` neighbouring elements in each access.
      left: int32, elements from this one on before the end of those that are stored; not above 0:
        none.
      skipped: int32, elements from this one on before the first one that is stored; None: none.
      width: 1, 2 or 4.
    """
    bounds = [
        [values[0] for _, values in _accesses(memory, bound, width)]
        for bound in (left, skipped)
        if bound is not None
    ]
    left_operand, skipped_operand = f"${width + 1}", f"${width + 2}"

    def and_not_skipped(predicate: str, k: int) -> list[str]:
        if skipped is None:
            return []
        return [f"setp.le.and.s32 {predicate}, {skipped_operand}, {k}, {predicate};"]

    lines = [
        ".reg .pred whole, part;",
        f"setp.gt.s32 whole, {left_operand}, {width - 1};",
        *and_not_skipped("whole", 0),
        f"@whole {_instruction(width)}",
    ]
    if width > 1:
        for k in range(width):
            lines.append(f"setp.gt.and.s32 part, {left_operand}, {k}, !whole;")
            lines += and_not_skipped("part", k)
            lines.append(f"@part st.global.cs.b32 [$0+{4 * k}], ${k + 1};")
    accesses = _accesses(memory, registers, width)
    for (pointer, values), *of_access in zip(accesses, *bounds, strict=True):
        _assembly(f"{{ {' '.join(lines)} }}", pointer, *values, *of_access)


def load_first(
    memory: ir.Value, start: mgpu.FragmentedArray, count: mgpu.FragmentedArray, stride: int
) -> mgpu.FragmentedArray:
    """Loads `count` int32 elements, `stride` apart, from `start * stride` on, and 0 up to 128.

    Args:
      memory: memref of one dimension.
      start: the first one, counted in strides, a scalar.
      count: a scalar; more than 128 is 128, less than 0 none.
      stride: elements of memory from one to the next.
    """
    i32 = ir.IntegerType.get_signless(32)
    value = _assembly(
        "{ .reg .pred exists; setp.lt.s32 exists, $2, $3; mov.b32 $0, 0;"
        " @exists ld.global.b32 $0, [$1]; }",
        *_of_thread(memory, start, count, stride),
        result=i32,
    )
    register = vector.broadcast(ir.VectorType.get((1,), i32), value)
    return mgpu.FragmentedArray(
        _registers=np.array([register], dtype=object),
        _layout=mgpu.WGStridedFragLayout((mgpu.utils.WARPGROUP_SIZE,), vec_size=1),
        _is_signed=True,
    )


def store_first(
    memory: ir.Value,
    registers: mgpu.FragmentedArray,
    start: mgpu.FragmentedArray,
    count: mgpu.FragmentedArray,
) -> None:
    """Stores the first `count` of 128 elements to [start, start + count) of a memref."""
    _assembly(
        "{ .reg .pred exists; setp.lt.s32 exists, $1, $2; @exists st.global.cs.b32 [$0], $3; }",
        *_of_thread(memory, start, count),
        *_elements(registers.registers.item(), 1),
    )


def _of_thread(
    memory: ir.Value, start: mgpu.FragmentedArray, count: mgpu.FragmentedArray, stride: int = 1
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The address of element (start + thread) * stride, the thread and `count`."""
    i32 = ir.IntegerType.get_signless(32)
    thread = mgpu.utils.thread_idx()
    index = arith.addi(thread, start.registers.item())
    index = arith.muli(index, mgpu.utils.c(stride, i32))
    address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(memory), [index], i32)
    return address, thread, count.registers.item()


def sums(memory: ir.Value, *addends: mgpu.FragmentedArray) -> list[mgpu.FragmentedArray]:
    """The sum of each of several int32 arrays of 128 elements; wraps as int32 does.

    Each warp adds up its own and tells the others: one exchange, however many there are.

    Args:
      memory: memref of shared memory, at least four int32 for each sum.
      addends: the arrays.
    """
    values = [_elements(addend.registers.item(), 1)[0] for addend in addends]
    i32 = ir.IntegerType.get_signless(32)
    of_warps = [_assembly(_WARP_SUM, value, result=i32) for value in values]
    parts = _exchanged(memory, of_warps)
    return [_splat(functools.reduce(arith.addi, of_warp)) for of_warp in parts]


def any_of(array: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """1 where one of the elements of an int32 array of 128 is not 0, a scalar; otherwise 0."""
    i32 = ir.IntegerType.get_signless(32)
    (value,) = _elements(array.registers.item(), 1)
    # As `warpgroup_barrier` numbers it.
    barrier = arith.addi(mgpu.utils.warpgroup_idx(sync=False), mgpu.utils.c(1, i32))
    text = (
        "{ .reg .pred is_set, is_any; setp.ne.s32 is_set, $1, 0;"
        f" barrier.cta.red.or.pred is_any, $2, {mgpu.utils.WARPGROUP_SIZE}, is_set;"
        " selp.b32 $0, 1, 0, is_any; }"
    )
    return _splat(_assembly(text, value, barrier, result=i32))


def exclusive_scan(
    operation: str, memory: ir.Value, *arrays: mgpu.FragmentedArray
) -> list[mgpu.FragmentedArray]:
    """Of int32 arrays of 128 elements, the sum or the greatest of those before each element.

    Each warp scans its own and tells the others its result: one exchange, however many there are.

    Args:
      operation: "add", which wraps as int32 does, or "max", of elements that are not negative.
      memory: memref of shared memory, at least four int32 for each array.
      arrays: the arrays.

    Returns:
      Of each array its scan, 0 for the first element, and the result of all, a scalar.
    """
    i32 = ir.IntegerType.get_signless(32)
    combine = {"add": arith.addi, "max": arith.maxsi}[operation]
    values = [_elements(v.registers.item(), 1)[0] for v in arrays]
    reduce = f"redux.sync.{operation}.s32 $0, $1, 0xffffffff;"
    of_warps = [_assembly(reduce, value, result=i32) for value in values]
    # The element of the thread before, then of twice as many in each step.
    combined = f"{operation}.s32 $0, $1, before"
    scanned = values
    for distance, use in [(1, "mov.b32 $0, before"), *((2**k, combined) for k in range(5))]:
        text = (
            "{ .reg .pred exists; .reg .b32 before;"
            f" shfl.sync.up.b32 before|exists, $1, {distance}, 0, 0xffffffff;"
            f" @!exists mov.b32 before, 0; {use}; }}"
        )
        scanned = [_assembly(text, value, result=i32) for value in scanned]
    warp, zero = _warp(), mgpu.utils.c(0, i32)
    results = []
    for array, value, parts in zip(arrays, scanned, _exchanged(memory, of_warps), strict=True):
        for k, part in enumerate(parts):
            later = arith.cmpi(arith.CmpIPredicate.sgt, warp, mgpu.utils.c(k, i32))
            value = combine(value, arith.select(later, part, zero))
        results += [_vector_like(array, value), _splat(functools.reduce(combine, parts))]
    return results


def gather(memory: ir.Value, indices: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """The elements at the indices of a memref of one dimension, none of them outside it."""
    i32 = ir.IntegerType.get_signless(32)
    return _vector_like(indices, llvm.load(i32, _place(memory, indices)))


def scatter(memory: ir.Value, indices: mgpu.FragmentedArray, vector: mgpu.FragmentedArray) -> None:
    """Stores an int32 array at the indices of a memref of one dimension, none of them outside."""
    (value,) = _elements(vector.registers.item(), 1)
    llvm.store(value, _place(memory, indices))


def _place(memory: ir.Value, indices: mgpu.FragmentedArray) -> ir.Value:
    """The address of the thread's index."""
    (index,) = _elements(indices.registers.item(), 1)
    i32 = ir.IntegerType.get_signless(32)
    return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(memory), [index], i32)


def store_rows(
    memory: ir.Value, rows: mgpu.FragmentedArray, *columns: mgpu.FragmentedArray
) -> None:
    """Stores rows of an int32 array in global memory, each by one thread.

    Args:
      memory: memref [..., len(columns)], contiguous.
      rows: which row each thread stores; negative: none.
      columns: the elements of the rows: 1, 2 or a multiple of 4 arrays.
    """
    width = min(len(columns), 4)
    base = mgpu.utils.memref_ptr(memory)
    (row,) = _elements(rows.registers.item(), 1)
    values = [_elements(column.registers.item(), 1)[0] for column in columns]
    for first in range(0, len(columns), width):
        operands = ", ".join(f"${k + 2}" for k in range(width))
        store = f"st.global.cs.b32 [at+{4 * first}], {operands}"
        if width > 1:
            store = f"st.global.cs.v{width}.b32 [at+{4 * first}], {{{operands}}}"
        _assembly(
            "{ .reg .pred wanted; .reg .b64 at; setp.ge.s32 wanted, $1, 0;"
            f" mad.wide.s32 at, $1, {4 * len(columns)}, $0; @wanted {store}; }}",
            base,
            row,
            *values[first : first + width],
        )


def _warp() -> ir.Value:
    """Which warp of the warpgroup a thread belongs to."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.shrui(mgpu.utils.thread_idx(), mgpu.utils.c(5, i32))


def _exchanged(memory: ir.Value, of_warp: Sequence[ir.Value]) -> list[list[ir.Value]]:
    """Of each int32 that all threads of a warp share, the values of all warps."""
    i32 = ir.IntegerType.get_signless(32)
    base = mgpu.utils.memref_ptr(memory)
    warp = _warp()
    for k, value in enumerate(of_warp):
        index = arith.addi(warp, mgpu.utils.c(_WARPS * k, i32))
        llvm.store(value, mgpu.utils.getelementptr(base, [index], i32))
    mgpu.utils.warpgroup_barrier()
    results = []
    for k in range(len(of_warp)):
        place = mgpu.utils.getelementptr(base, [_WARPS * k], i32)
        parts = llvm.load(ir.VectorType.get((_WARPS,), i32), place, alignment=4 * _WARPS)
        results.append(_elements(parts, _WARPS))
    mgpu.utils.warpgroup_barrier()  # before the memory is used again
    return results


def _vector_like(array: mgpu.FragmentedArray, value: ir.Value) -> mgpu.FragmentedArray:
    """An int32 array of 128 elements, of which a thread has one, in the layout of another."""
    register = vector.broadcast(ir.VectorType.get((1,), ir.IntegerType.get_signless(32)), value)
    registers = np.array([register], dtype=object).reshape(array.registers.shape)
    return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=True)


def _splat(value: ir.Value) -> mgpu.FragmentedArray:
    """A scalar that all threads have."""
    return mgpu.FragmentedArray.splat(value, (), mgpu.WGSplatFragLayout(()), is_signed=True)


def end_of_loop(count: int) -> mgpu.FragmentedArray:
    """`count`, a scalar, where neither LLVM nor ptxas is to write out the loop around it."""
    text = f'.pragma "nounroll"; mov.b32 $0, {count};'
    return _splat(_assembly(text, result=ir.IntegerType.get_signless(32)))


def use(scalar: mgpu.FragmentedArray) -> None:
    """An empty instruction with a scalar as its operand, which must be computed before it."""
    _assembly("", scalar.registers.item())


def _instruction(width: int) -> str:
    operands = ", ".join(f"${k + 1}" for k in range(width))
    if width == 1:
        return f"st.global.cs.b32 [$0], {operands};"
    return f"st.global.cs.v{width}.b32 [$0], {{{operands}}};"


def _accesses(
    memory: ir.Value, registers: mgpu.FragmentedArray, width: int
) -> Iterator[tuple[ir.Value, list[ir.Value]]]:
    for get, _, target, index in registers.transfer_strided(memory, width):
        pointer = mgpu.utils.memref_ptr(mgpu.utils.memref_slice(target, tuple(index)))
        yield pointer, _elements(get(registers.registers), width)


def _elements(register: ir.Value, count: int) -> list[ir.Value]:
    return [
        vector.extract(register, dynamic_position=[], static_position=[k]) for k in range(count)
    ]


def _assembly(text: str, *operands: ir.Value, result: ir.Type | None = None) -> Any:
    constraints = ["l" if isinstance(o.type, llvm.PointerType) else "r" for o in operands]
    return llvm.inline_asm(
        result or ir.Type.parse("!llvm.void"),
        operands,
        text,
        ",".join([*(["=r"] if result else []), *constraints]),
        has_side_effects=True,
    )
