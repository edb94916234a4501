"""The native library: where it lies, whether it fits, and what Python calls in it.

`ffi/` holds its sources. There is one for each platform, a Python module that defines the functions
of `NativeLibrary` and, for `implementations.ffi`, XLA FFI handlers.
"""

import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import itertools
import json
import shlex
import sysconfig
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, get_args

import jax

from jaxnsa.metadata import FIELDS
from jaxnsa.schedules import FlashMlaLayout, FlashMlaLengths, PagedMqaLayout, Schedules
from jaxnsa.spec import MAX_LEN

LIBRARIES = {"cpu": "jaxnsa_cpu", "gpu": "jaxnsa_cuda"}
"""By platform, the name of its library."""

_NEEDS = {
    "cpu": "a C++17 compiler and Python's headers",
    "gpu": "a C++17 compiler, Python's headers and nvcc 12.1 or newer",
}
_XLA_PLATFORMS = {"cpu": "cpu", "gpu": "CUDA"}

Vector = tuple[int, int]
"""A vector of int32 or int64: its address and the bytes of an element."""

Pool = tuple[int, int, int, int]
"""`req_to_token`: its address, rows, elements from row to row, and columns."""

Span = tuple[int, int]
"""Memory: the address of the first byte and the one past the last."""


class NativeRows(Protocol):
    """Rows as the library takes them; see `jaxnsa.spec.Rows`."""


class PreparedLaunch(Protocol):
    """A launch of `fused_metadata` for tensors that stay the same from step to step."""

    declined: str
    """Why `try_launch` or `try_step` last returned False."""

    def hold_flash_mla(self, items: int, address: int) -> None:
        """Lets launches copy FlashMLA's arrays where its schedule is constant.

        Args:
          items: of the schedule; that of other numbers of items is computed.
          address: of the arrays, one behind the other; they must outlive the launches.
        """

    def watch(
        self,
        exchange_api: Any,
        tensor: Any,
        *,
        registered: Sequence[Any],
        handles_of: Callable[[list[Any]], list[Any]] | None,
        written: Sequence[Span],
        min_columns: int,
    ) -> None:
        """Lets `try_launch` and `try_step` look at tensors by themselves.

        Args:
          exchange_api: the framework's DLPack C exchange API, a capsule.
          tensor: one that the launch writes, on the device of all.
          registered: tensors that their calls are to find as they are now.
          handles_of: makes an AtenTensorHandle of LibTorch's C ABI for each of them, in capsules,
            which the library deletes; None: they cannot be looked at.
          written: the memory that the launch writes, in order and apart; inputs must not touch it.
          min_columns: of `req_to_token`.
        """

    def track(self, held: int, rows: int) -> None:
        """Lets launches keep track of what table rows hold, as `jaxnsa.BatchTracker` does.

        Args:
          held: the address of int32 [rows, 2, 4], zeros at first, which stays where it is: of the
            last two steps that gave each table row to a request, in either order, the request in
            two words, leading tokens that the row held of it, and the step's number.
          rows: table rows.
        """

    def ask_for_rows(
        self, rows_of: Callable[[int, Any, Any, Any], tuple[NativeRows, int, bool]]
    ) -> None:
        """Lets `try_step` ask for a step's rows.

        Args:
          rows_of: of the requests, forward_mode, num_draft_tokens and max_total_tokens of a step
            its rows, the address of FlashMLA's arrays where those are constant for them, otherwise
            0, and whether that is so for every step alike. It raises what is wrong with them.
        """

    def try_step(
        self,
        seq_lens: Any,
        req_pool_indices: Any,
        req_to_token: Any,
        extend_seq_lens: Any,
        forward_mode: Any,
        num_draft_tokens: Any,
        max_total_tokens: Any,
        written_lens: Any,
        max_new_tokens: Any,
        request_ids: Any,
    ) -> bool:
        """Launches with a step's arguments as they came, as `try_launch` does."""

    def try_launch(
        self,
        rows: NativeRows,
        seq_lens: Any,
        req_pool_indices: Any,
        req_to_token: Any,
        extend_seq_lens: Any,
    ) -> bool:
        """Launches with a step's tensors on their framework's current stream, if all is well.

        Returns:
          Whether it did; False, with nothing launched, where something is not as it should be.
        """

    def launch(
        self,
        stream: int,
        rows: NativeRows,
        seq_lens: Vector,
        req_pool_indices: Vector,
        pool: Pool,
        extend_seq_lens: Vector | None,
        written_lens: Vector | None = None,
        max_new_tokens: int = MAX_LEN,
        request_ids: Vector | None = None,
    ) -> None:
        """Launches with inputs that were checked."""


class NativeLibrary(Protocol):
    """What the module of a library defines.

    Functions that take a stream, a cudaStream_t or 0, queue work there; on a CPU they are done when
    they return. They raise RuntimeError where a launch fails, and check no tensor.
    """

    fields: Sequence[tuple[str, str]]
    """Name and extent of each array that it was built for."""

    max_backends: int
    """How many backends one launch takes."""

    xla_ffi_api: tuple[int, int]
    """The XLA FFI API that it was built with."""

    def xla_handlers(self) -> Mapping[str, Any]:
        """Its XLA FFI handlers, capsules by the name of their target."""

    def load_kernels(self) -> None:
        """Loads every kernel on the current CUDA device, so that no launch does."""

    def describe_tensors(self, exchange_api: Any, tensors: Sequence[Any]) -> bytes | None:
        """What tensors are, to be compared; None where one cannot be described."""

    def copy(
        self,
        stream: int,
        arrays: Sequence[tuple[int, int, int, int]],
        destinations: Sequence[Sequence[int]],
    ) -> None:
        """Copies contiguous arrays to several destinations in one launch.

        Args:
          stream: of the launch.
          arrays: of each, the address, rows, columns, and elements from row to row in destinations.
          destinations: of each, the addresses of the arrays.
        """

    def fill_draft_extend_metadata(
        self,
        stream: int,
        *,
        variant: str,
        rows: NativeRows,
        nsa_index_topk: int,
        extend_seq_lens: Vector,
        seq_lens: Vector,
        seqlens_expanded: int,
        nsa_cache_seqlens: int,
        total_tokens: int,
        offsets: int,
    ) -> None:
        """The lengths of a draft-extend step; padding rows are left alone.

        Outputs are addresses; `offsets`, int32 [requests + 1] of scratch, may be 0 with the variant
        "optimized".
        """

    def Rows(
        self,
        requests: int,
        count: int,
        rows_per_request: int,
        added_tokens: int,
        prefill: bool,
    ) -> NativeRows:
        """Rows as the library takes them; `rows_per_request` is 0 where they are ragged."""

    def PreparedLaunch(
        self,
        backends: Sequence[Mapping[str, int]],
        *,
        strides: Mapping[str, int],
        tokens_per_column: Mapping[str, int],
        slots_per_page: Mapping[str, int],
        max_len: int,
        max_total_keys: int,
        nsa_index_topk: int,
        index_kpool: int,
        paged_mqa: Sequence[int],
        topk_plan: Sequence[int],
        flash_mla: Sequence[int],
        tail: str,
        requests_are_items: bool,
        backend_offsets: Sequence[int],
    ) -> PreparedLaunch:
        """Prepares a launch.

        Args:
          backends: for each backend, the address of each array that it wants, by name.
          strides: of each table, the elements from row to row.
          tokens_per_column, slots_per_page: of each table.
          max_len: the most columns of a table, in tokens; a step writes at most those of its pool.
          max_total_keys: length of the flat table; 0 where there is none.
          nsa_index_topk: the indexer's top-k.
          index_kpool: tokens that the indexer pools into one key.
          paged_mqa, topk_plan, flash_mla: the `schedule_arguments`.
          tail: what tables hold past a row's live columns.
          requests_are_items: whether consumers read a request's rows as one: all have the live
            columns, and the context length, of the last.
          backend_offsets: of each backend, the tokens by which its `seq_lens` are longer.
        """


def schedule_arguments(schedules: Schedules) -> dict[str, list[int]]:
    """Schedules as the library takes them: the numbers of each, none where it is not wanted."""
    paged_mqa, plan, flash_mla = schedules.paged_mqa, schedules.topk_plan, schedules.flash_mla
    numbers: dict[str, list[int]] = {"paged_mqa": [], "topk_plan": [], "flash_mla": []}
    if paged_mqa is not None:
        layout = get_args(PagedMqaLayout).index(paged_mqa.layout)
        numbers["paged_mqa"] = [paged_mqa.num_sms, layout, int(paged_mqa.per_row)]
    if plan is not None:
        numbers["topk_plan"] = [plan.floor, *itertools.chain(*plan.pairs)]
    if flash_mla is not None:
        numbers["flash_mla"] = [
            flash_mla.num_sm_parts,
            get_args(FlashMlaLengths).index(flash_mla.lengths),
            flash_mla.fixed_overhead_blocks,
            get_args(FlashMlaLayout).index(flash_mla.layout),
        ]
    return numbers


def library(platform: str) -> NativeLibrary:
    """The library for "cpu" or "gpu"; its handlers are registered with JAX.

    Raises:
      RuntimeError: it was not built or cannot be loaded; the message says what to do.
    """
    found = _find(platform)
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def unavailable(platform: str) -> str | None:
    """Why there is no library for "cpu" or "gpu", and what would change that; None if there is."""
    found = _find(platform)
    return found if isinstance(found, str) else None


def library_path(platform: str) -> Path:
    """Where the library for "cpu" or "gpu" lies, if it was built."""
    package = importlib.metadata.distribution("jaxnsa")
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return Path(str(package.locate_file("jaxnsa"))) / f"{LIBRARIES[platform]}{suffix}"


def how_to_rebuild() -> str:
    """The command that builds the libraries anew, from the folder that was installed if known."""
    folder = "PATH_TO_JAXNSA"
    if origin := importlib.metadata.distribution("jaxnsa").read_text("direct_url.json"):
        path = urllib.parse.unquote(urllib.parse.urlparse(json.loads(origin)["url"]).path)
        if Path(path, "pyproject.toml").exists():
            folder = shlex.quote(path)
    return f"pip install --force-reinstall --no-deps {folder}"


@functools.cache
def _find(platform: str) -> NativeLibrary | str:
    """The library, loaded once; or why there is none, and what would change that."""
    path = library_path(platform)
    if not path.exists():
        return (
            f"{path.name} was not built when jaxnsa was installed, which takes {_NEEDS[platform]}; "
            f"install that, then run: {how_to_rebuild()}"
        )
    try:
        module = _import(path)
    except ImportError as error:
        return f"{path} could not be loaded: {error}; to rebuild it, run: {how_to_rebuild()}"
    expected = [(field.name, field.extent.value) for field in FIELDS.values()]
    if list(module.fields) != expected:
        differing = sorted(name for name, _ in {*module.fields} ^ {*expected}) or "their order"
        return (
            f"{path} was built for other fields of NSAMetadata than this jaxnsa has ({differing}); "
            f"to rebuild it, run: {how_to_rebuild()}"
        )
    for target, handler in module.xla_handlers().items():
        jax.ffi.register_ffi_target(target, handler, platform=_XLA_PLATFORMS[platform])
    return module


@functools.cache
def _import(path: Path) -> Any:
    """The module in a file, which lies beside an installed jaxnsa and maybe not beside this one."""
    loader = importlib.machinery.ExtensionFileLoader("jaxnsa_native", str(path))
    spec = importlib.util.spec_from_file_location("jaxnsa_native", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
