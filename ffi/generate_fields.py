"""Writes the C++ description of the arrays of `NSAMetadata` out of `jaxnsa/metadata.py`.

CMake runs it whenever one of the two changes. Kernels store through the structs and functions that
it writes: a value struct cannot be constructed without a value for each of its arrays, so that a
kernel that leaves an array out does not compile.
"""

import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

HEADER = """\
// Written by generate_fields.py out of jaxnsa/metadata.py: do not edit.
#ifndef JAXNSA_FIELDS_H_
#define JAXNSA_FIELDS_H_

#include <cstdint>

#include "integers.h"

namespace jaxnsa {
"""

FOOTER = """
}  // namespace jaxnsa

#endif  // JAXNSA_FIELDS_H_
"""

VALUES = {
    ("requests",): ("RequestValues", "The arrays of [requests]: what they hold for a request."),
    ("requests + 1",): ("RequestSums", "The arrays of [requests + 1]: sums over those before."),
    ("rows", "paged MQA items"): ("RowValues", "The arrays of [rows]: what they hold for a row."),
    ("rows + 1",): ("RowSums", "The arrays of [rows + 1]: sums over the rows before."),
}
"""By extents, the struct of what a kernel stores at one index."""

GROUPS = {
    "Lengths": ("The arrays with a value for each request, row or key", (*sum(VALUES, ()), "keys")),
    "Tables": ("The tables", ("table",)),
    "ScheduleArrays": (
        "The arrays that are written as a whole",
        ("multiprocessors + 1", "planned rows", "parts", "FlashMLA items + 1"),
    ),
}
"""By struct of pointers, what they point to and the extents of it. A backend has all of them."""

MEMBERS = {"Lengths": "lengths", "Tables": "tables", "ScheduleArrays": "schedules"}
"""By struct of pointers, its name in a backend."""

LEFT_OUT = {"prefill": "WithoutPrefill", "pooled": "WithoutPooled"}
"""By when arrays of lengths are wanted, the function that leaves them out."""


def main(metadata_path: str, header_path: str) -> None:
    """Writes the header."""
    metadata = load(Path(metadata_path))
    Path(header_path).write_text(header(metadata.FIELDS, metadata.Extent))


def load(path: Path) -> ModuleType:
    """`jaxnsa/metadata.py` by itself, without importing the package that is being built."""
    spec = importlib.util.spec_from_file_location("jaxnsa_metadata", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def header(fields: Any, extents: Any) -> str:
    """The header for a mapping of `Field` by name and the enum of extents."""

    def of_extents(extents: tuple[str, ...]) -> list[str]:
        return [name for name, field in fields.items() if field.extent.value in extents]

    groups = {struct: of_extents(described) for struct, (_, described) in GROUPS.items()}
    parts = [
        HEADER,
        "// What an array has an element for, and one of two dimensions a row.\n"
        + _enum("enum class Extent : int32_t", [extent.value for extent in extents]),
        "// The arrays of a backend.\n" + _enum("enum Field : int32_t", fields),
        f"constexpr int kFields = {len(fields)};\n",
        _descriptions(fields),
        *(_pointers(struct, GROUPS[struct][0], names) for struct, names in groups.items()),
        _backend(fields, groups),
    ]
    for described, (struct, comment) in VALUES.items():
        names = of_extents(described)
        parts += [_values(struct, comment, names), _store(struct, names)]
    for wanted, function in LEFT_OUT.items():
        names = [name for name in groups["Lengths"] if fields[name].wanted == wanted]
        parts.append(_left_out(function, wanted, names))
    return "\n".join(parts) + FOOTER


def _constant(name: str) -> str:
    return "k" + "".join(
        word.capitalize() for word in re.split(r"[_ ]+", name.replace("+", "plus"))
    )


def _enum(declaration: str, names: Iterable[str]) -> str:
    body = "".join(f"  {_constant(name)},\n" for name in names)
    return f"{declaration} {{\n{body}}};\n"


def _descriptions(fields: Any) -> str:
    rows = "".join(
        f'    {{"{name}", "{field.extent.value}", Extent::{_constant(field.extent.value)}}},\n'
        for name, field in fields.items()
    )
    return (
        "struct FieldDescription {\n"
        "  const char* name;\n"
        "  const char* extent_name;\n"
        "  Extent extent;\n"
        "};\n\n"
        "// By Field.\n"
        f"constexpr FieldDescription kFieldDescriptions[kFields] = {{\n{rows}}};\n"
    )


def _pointers(struct: str, comment: str, names: list[str]) -> str:
    body = "".join(f"  int32_t* {name};\n" for name in names)
    return f"// {comment}; null: not wanted.\nstruct {struct} {{\n{body}}};\n"


def _backend(fields: Any, groups: dict[str, list[str]]) -> str:
    member = {name: MEMBERS[struct] for struct, names in groups.items() for name in names}
    cases = "".join(
        f"    case {_constant(name)}:\n      return backend.{member[name]}.{name};\n"
        for name in fields
    )
    members = "".join(f"  {struct} {MEMBERS[struct]};\n" for struct in groups)
    return (
        "// All arrays of a backend.\n"
        f"struct Backend {{\n{members}}};\n\n"
        "inline int32_t*& ArrayOf(Backend& backend, Field field) {\n"
        f"  switch (field) {{\n{cases}  }}\n"
        "  __builtin_unreachable();\n}\n"
    )


def _values(struct: str, comment: str, names: list[str]) -> str:
    members = "".join(f"  int32_t {name};\n" for name in names)
    parameters = ", ".join(f"int32_t {name}_value" for name in names)
    initializers = ", ".join(f"{name}({name}_value)" for name in names)
    return (
        f"// {comment}\n"
        f"struct {struct} {{\n{members}\n"
        f"  JAXNSA_HOST_DEVICE explicit {struct}({parameters})\n"
        f"      : {initializers} {{}}\n"
        "};\n"
    )


def _store(struct: str, names: list[str]) -> str:
    body = "".join(
        f"  if (to.{name} != nullptr) to.{name}[index] = values.{name};\n" for name in names
    )
    return (
        "JAXNSA_HOST_DEVICE void Store(const Lengths& to, int64_t index, "
        f"const {struct}& values) {{\n{body}}}\n"
    )


def _left_out(function: str, wanted: str, names: list[str]) -> str:
    body = "".join(f"  to.{name} = nullptr;\n" for name in names)
    return (
        f"// Without the arrays that only `{wanted}` wants.\n"
        f"JAXNSA_HOST_DEVICE Lengths {function}(Lengths to) {{\n{body}  return to;\n}}\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
