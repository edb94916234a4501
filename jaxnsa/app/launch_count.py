"""How much a compiled function launches, read off its optimized HLO."""

import re

import jax

# Operations that only name or rearrange buffers.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([\w-]+)\(")


def count_launches(compiled: jax.stages.Compiled) -> int:
    """Top-level operations that do work: kernels and copies on a GPU, their likes on a CPU.

    A loop counts as one.
    """
    lines = (compiled.as_text() or "").splitlines()
    entry = next(i for i, line in enumerate(lines) if line.startswith("ENTRY "))
    operations = []
    for line in lines[entry + 1 :]:
        if line.startswith("}"):
            break
        if match := _OPERATION.match(line):
            operations.append(match[1])
    return sum(operation not in _FREE for operation in operations)
