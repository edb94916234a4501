"""Tensors filled that are given with each call: checked where they are new, then launched alone."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from jaxnsa.implementations.native_library import NativeRows, PreparedLaunch
from jaxnsa.interop.launch_cache import Key, LaunchCache
from jaxnsa.interop.launches import (
    launch_checked,
    library_for,
    native_rows,
    prepared,
    report_declined,
)
from jaxnsa.interop.tensor_checks import Checked, WrittenMemory, exchange_api
from jaxnsa.metadata import FIELDS, Extent
from jaxnsa.spec import Spec

Inputs = tuple[Any, Any, Any, Any]
"""seq_lens, req_pool_indices, req_to_token, extend_seq_lens or None, as they came."""


class CheckedInputs(NamedTuple):
    """The inputs of a step, in the order of `Inputs`."""

    seq_lens: Checked
    req_pool_indices: Checked
    req_to_token: Checked
    extend_seq_lens: Checked | None


class FillCache(LaunchCache[tuple[PreparedLaunch, NativeRows]]):
    """Launches that fill the tensors of N backends."""

    def try_launch(self, key: Key | None, inputs: Inputs) -> bool:
        """Launches what is known; False if it is not, or the inputs want checks."""
        known = self.get(key)
        if known is None:
            return False
        launch, rows = known
        return launch.try_launch(rows, *inputs)

    def launch(
        self,
        key: Key | None,
        spec: Spec,
        read: CheckedInputs,
        backends: Sequence[Mapping[str, Checked]],
        *,
        requests_are_items: bool = False,
    ) -> None:
        """Launches what `try_launch` did not, and remembers it if it is one launch with a key.

        Args:
          key: of the call.
          spec: what is computed for each backend.
          read: the inputs.
          backends: the tensors of each by field name; fields without one are left out.
          requests_are_items: whether consumers read a request's rows as one: all have the live
            columns, and the context length, of the last.

        Raises:
          ValueError: tensors that are written share memory, with each other or with an input.
        """
        memory = WrittenMemory([tensor for backend in backends for tensor in backend.values()])
        memory.check_apart([tensor for tensor in read if tensor is not None])
        native = library_for(read.seq_lens.tensor.device)
        rows = native_rows(native, spec.rows)
        groups = _groups(backends, native.max_backends)
        for group in groups:
            launch = prepared(native, spec, group, requests_are_items=requests_are_items)
            launch_checked(launch, rows, *read)
        if key is None or len(groups) != 1:
            return
        if known := self.get(key):
            report_declined(known[0].declined)
            return
        launch.watch(
            exchange_api(),
            memory.tensors[0],
            registered=[],
            handles_of=None,
            written=memory.spans,
            min_columns=spec.max_len,
        )
        self.add(key, (launch, rows))


def _groups(
    backends: Sequence[Mapping[str, Checked]], most: int
) -> list[list[dict[str, torch.Tensor]]]:
    """Backends as launches take them: at most so many, whose tables have equal strides."""
    alike: dict[tuple[int, ...], list[dict[str, torch.Tensor]]] = {}
    for backend in backends:
        tensors = {field: checked.tensor for field, checked in backend.items()}
        strides = tuple(
            tensor.stride(0)
            for field, tensor in tensors.items()
            if FIELDS[field].extent is Extent.TABLE
        )
        alike.setdefault(strides, []).append(tensors)
    return [
        group[first : first + most]
        for group in alike.values()
        for first in range(0, len(group), most)
    ]
