"""Streaming stores, which Pallas has no name for: `st.global.cs`, evicted from the caches first."""

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector


def store_streaming(memory: ir.Value, registers: mgpu.FragmentedArray, width: int) -> None:
    """Stores an int32 array to global memory.

    A launch writes every destination once and reads none of them, so lines that it wrote are the
    first that the L2 cache can do without.

    Args:
      memory: memref of the shape of the array.
      registers: the array, with `width` neighbouring elements in each access.
      width: 1, 2 or 4.
    """
    suffix = "" if width == 1 else f".v{width}"
    operands = ", ".join(f"${k + 1}" for k in range(width))
    if width > 1:
        operands = f"{{{operands}}}"
    for get, _, target, index in registers.transfer_strided(memory, width):
        pointer = mgpu.utils.memref_ptr(mgpu.utils.memref_slice(target, tuple(index)))
        values = get(registers.registers)
        elements = [
            vector.extract(values, dynamic_position=[], static_position=[k]) for k in range(width)
        ]
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [pointer, *elements],
            f"st.global.cs{suffix}.b32 [$0], {operands};",
            ",".join(["l"] + ["r"] * width),
            has_side_effects=True,
        )
