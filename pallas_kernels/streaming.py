"""Stores that Pallas has no name for: past the caches, and of some of a vector's elements.

A launch writes every destination once and reads none of them, so lines that it wrote are the first
that the L2 cache can do without: `st.global.cs`.
"""

from collections.abc import Iterator

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector


def store(memory: ir.Value, registers: mgpu.FragmentedArray, width: int) -> None:
    """Stores an int32 array to global memory.

    Args:
      memory: memref of the shape of the array.
      registers: the array, with `width` neighbouring elements in each access.
      width: 1, 2 or 4.
    """
    for pointer, values in _accesses(memory, registers, width):
        _assembly(_instruction(width), pointer, *values)


def store_some(
    memory: ir.Value,
    registers: mgpu.FragmentedArray,
    left: mgpu.FragmentedArray,
    width: int,
) -> None:
    """Stores a part of an int32 array to global memory, and touches nothing else.

    Args:
      memory: memref of the shape of the array.
      registers: the array, with `width` neighbouring elements in each access.
      left: int32, how many elements are to be stored from this one on; not above 0: none.
      width: 1, 2 or 4.
    """
    lines = [
        ".reg .pred whole, part;",
        f"setp.ge.s32 whole, ${width + 1}, {width};",
        f"@whole {_instruction(width)}",
    ]
    if width > 1:
        for k in range(width):
            lines.append(f"setp.gt.and.s32 part, ${width + 1}, {k}, !whole;")
            lines.append(f"@part st.global.cs.b32 [$0+{4 * k}], ${k + 1};")
    counts = [values[0] for _, values in _accesses(memory, left, width)]
    accesses = _accesses(memory, registers, width)
    for (pointer, values), count in zip(accesses, counts, strict=True):
        _assembly(f"{{ {' '.join(lines)} }}", pointer, *values, count)


def scatter(
    memory: ir.Value,
    registers: mgpu.FragmentedArray,
    positions: mgpu.FragmentedArray,
    width: int,
) -> None:
    """Stores the first element of each access of an int32 array where its position says.

    Args:
      memory: memref of one dimension.
      registers: the array, with `width` neighbouring elements in each access.
      positions: int32 indices into `memory`, of the same shape; negative: not stored.
      width: 1, 2 or 4.
    """
    base = mgpu.utils.memref_ptr(memory)
    for value, position in zip(registers.registers.flat, positions.registers.flat, strict=True):
        _assembly(
            "{ .reg .pred wanted; .reg .b64 at; setp.ge.s32 wanted, $2, 0;"
            " mad.wide.s32 at, $2, 4, $0; @wanted st.global.cs.b32 [at], $1; }",
            base,
            *_elements(value, 1),
            *_elements(position, 1),
        )


def use(scalar: mgpu.FragmentedArray) -> None:
    """An instruction that is none, but needs a scalar."""
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


def _assembly(text: str, *operands: ir.Value) -> None:
    constraints = ("l" if isinstance(o.type, llvm.PointerType) else "r" for o in operands)
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"), operands, text, ",".join(constraints), has_side_effects=True
    )
