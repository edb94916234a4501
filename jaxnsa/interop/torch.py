"""PyTorch tensors: metadata handed over without copies, and an engine's static buffers filled."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import torch

from jaxnsa import argument_checks
from jaxnsa.config import overridden, settings
from jaxnsa.implementations import native_library
from jaxnsa.interop.direct_path import DirectPath
from jaxnsa.interop.dlpack_path import DlpackOptions, DlpackPath
from jaxnsa.interop.held_rows import HeldRows
from jaxnsa.interop.registration import Registered
from jaxnsa.interop.tensor_checks import (
    Checked,
    check_for_jax,
    check_memory,
    checked_pool,
    checked_vector,
    platform_of,
)
from jaxnsa.metadata import ForwardMode
from jaxnsa.schedules import Schedules
from jaxnsa.spec import INT32_MAX, INT32_MIN, Inputs, Rows
from jaxnsa.value_checks import check_inputs

__all__ = ["BackendBuffers", "DlpackOptions", "from_torch", "to_torch"]


def to_torch(tree: Any) -> Any:
    """The arrays of a pytree as tensors over the same memory.

    What PyTorch queues next on its current stream waits for the arrays to be computed.

    Args:
      tree: any pytree of jax.Array, such as NSAMetadata; None stays None.

    Returns:
      The same structure of torch.Tensor, of the same shapes and dtypes.

    Raises:
      TypeError: a leaf is no jax.Array, one inside a function that is being traced, or of a dtype
        that PyTorch does not have.
      ValueError: an array was deleted, such as one that was donated.
    """

    def tensor(path: Any, array: Any) -> torch.Tensor:
        name = f"tree{jax.tree_util.keystr(path)}"
        if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
            raise TypeError(f"{name}: got {type(array).__name__}, expected a concrete jax.Array")
        if jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
            raise TypeError(f"{name}: got {array.dtype}, expected a dtype that PyTorch has")
        if array.is_deleted():
            raise ValueError(f"{name}: got a deleted array, expected one not donated before")
        if array.platform() == "cpu":
            array.block_until_ready()  # PyTorch does not wait for computations on a CPU
        with _named(name):
            return torch.from_dlpack(array)

    return jax.tree.map_with_path(tensor, tree)


def from_torch(tree: Any) -> Any:
    """The tensors of a pytree as arrays over the same memory.

    What JAX computes from them waits for what PyTorch has queued on its current stream so far. The
    arrays may be donated, as `out=`, on a GPU; JAX takes other arrays to be immutable, so do not
    write the tensors while JAX uses the arrays.

    Args:
      tree: any pytree of contiguous torch.Tensor; None stays None. A tensor on a CPU whose address
        is no multiple of 64 is copied.

    Returns:
      The same structure of jax.Array; int64 becomes int32 unless `jax_enable_x64` is set: a copy,
      in which a value past int32 is its largest or smallest.

    Raises:
      TypeError: a leaf is no torch.Tensor, one that requires a gradient, or of a dtype that JAX
        does not have, or not without `jax_enable_x64`.
      ValueError: a tensor is not contiguous, on a GPU at an address that is no multiple of 16, or
        its memory was freed.
    """

    def array(path: Any, tensor: Any) -> jax.Array:
        name = f"tree{jax.tree_util.keystr(path)}"
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
        check_for_jax(name, tensor)
        check_memory(name, tensor)
        takes_int64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        if tensor.dtype is torch.int64 and not takes_int64:
            tensor = tensor.clamp(INT32_MIN, INT32_MAX).to(torch.int32)
        if tensor.dtype in _OF_X64 and not takes_int64:
            raise TypeError(
                f"{name}: got {tensor.dtype}, which JAX takes with jax_enable_x64 alone"
            )
        with _named(name):
            return jax.dlpack.from_dlpack(tensor)

    return jax.tree.map_with_path(array, tree)


_OF_X64 = (torch.float64, torch.complex128, torch.uint64)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Names what DLPack does not hand over."""
    try:
        yield
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name}: got what DLPack does not hand over: {error}") from error


class BackendBuffers:
    """The static tensors of N attention backends, refreshed in place for every step.

    An engine allocates them once, at the sizes of its largest batch, and captures CUDA graphs that
    read them. `update` writes the metadata of a step to the start of each tensor: addresses never
    change, and rows past the batch and columns past the live ones are left alone. Work that was
    queued on PyTorch's current stream before `update` is seen by it, and what is queued there
    afterwards sees its results; nothing synchronises the device. Threads that update the same
    tensors do so one after the other, on their own current streams.

    Keep the object until its updates are done, and for as long as a CUDA graph replays one: what it
    knows of table rows, for `request_ids`, is in memory of its own, which updates write. While it
    lives, `torch.utils.swap_tensors` refuses the tensors.

    There are two paths. "direct" launches one kernel of the native library on PyTorch's current
    stream, with schedules or pooled pages one for each 8 backends, without JAX; `torch.cuda.graph`
    captures it. The library itself looks at the tensors of a step, and Python only at those that
    are not as they should be, or at all of them before PyTorch 2.10, at some microseconds more.
    "dlpack" runs any implementation through JAX on a stream of JAX's own, which waits for PyTorch's
    current one and that one for it. It is compiled for the registered sizes, pads smaller batches,
    writes tables that are contiguous and no wider than the pool, all rows of them, and cannot be
    captured. A schedule is that of the batch itself: with schedules it pads none, and compiles for
    each size when it first comes.

    With the setting `validate`, of `jaxnsa.override` at an update or of the environment at
    registration, each update reads its inputs on the host and checks their values first.
    """

    def __init__(
        self,
        buffers: Sequence[Mapping[str, torch.Tensor | None] | Any],
        *,
        nsa_index_topk: int,
        real_page_size: int,
        index_kpool: int = 1,
        schedules: Schedules | None = None,
        backend_offsets: Sequence[int] | None = None,
        path: Literal["direct", "dlpack"] | None = None,
        dlpack: DlpackOptions | None = None,
    ):
        """Checks and registers the tensors, and loads or compiles what `update` runs.

        On the path "dlpack" an update with `written_lens` or `request_ids`, and any with schedules,
        is compiled when it first comes.

        Args:
          buffers: for each backend a mapping or an object with NSAMetadata's field names: int32
            tensors on one device, contiguous but for the tables, whose rows may be apart. The
            lengths of `cache_seqlens` and `seqlens_expanded` are the most requests and rows.
            `page_indices`, or with a page size of 1 `real_page_table`, may be None or absent in
            all backends, and so may the arrays of prefill: tensors with them are for
            `ForwardMode.EXTEND` and no other mode, `flat_page_indices` among them or not.
          nsa_index_topk: the indexer's top-k, in tokens.
          real_page_size: tokens in a physical page.
          index_kpool: tokens that the indexer pools into one key; more than 1 asks for the pooled
            arrays.
          schedules: asks for the arrays of these, at the sizes of the largest batch: each must be
            there in all backends. `paged_mqa_ctx_lens` may have any shape of as many elements as
            there are rows; a step of items of several rows writes them one behind the other. A
            constant schedule is computed here for the registered rows, and once for any other
            number of rows that comes, but not while a CUDA graph is captured: the kernel computes
            it then, at some microseconds more.
          backend_offsets: an int for each backend, which is computed for `seq_lens` of so many
            tokens more; None: all 0.
          path: None takes "direct" where the native library can run, otherwise "dlpack".
          dlpack: what the path "dlpack" is compiled for, and required by it.

        Raises:
          ValueError, TypeError: a tensor is of the wrong shape, dtype, device or layout, or shares
            memory with another; the message names it.
          RuntimeError: the path that was asked for cannot run; the message says why.
        """
        topk = argument_checks.integer("nsa_index_topk", nsa_index_topk, 1)
        page = argument_checks.integer("real_page_size", real_page_size, 1)
        kpool = argument_checks.integer("index_kpool", index_kpool, 1, INT32_MAX // page)
        wanted = argument_checks.schedules(schedules)
        self._registered = Registered(buffers, topk, page, kpool, wanted, backend_offsets)
        if path is None:
            missing = native_library.unavailable(platform_of(self._registered.device))
            path = "dlpack" if missing else "direct"
        argument_checks.one_of("path", path, ("direct", "dlpack"))
        if not isinstance(dlpack, DlpackOptions | None):
            got = argument_checks.described(dlpack)
            raise TypeError(f"dlpack: got {got}, expected DlpackOptions")
        self._validate = settings().validate
        largest, device = self._registered.spec.rows, self._registered.device
        # Threads of a launch ask what rows held before it while others take down what they get.
        steps = 2 if path == "direct" else 1
        self._held_rows = HeldRows(largest.tables.count, steps, device)
        self._path: DirectPath | DlpackPath
        if path == "direct":
            self._path = DirectPath(self._registered, self._held_rows)
        elif dlpack is None:
            raise ValueError('dlpack: got None, expected DlpackOptions as path is "dlpack"')
        else:
            self._path = DlpackPath(self._registered, self._held_rows, dlpack)

    @property
    def path(self) -> str:
        """What `update` runs: "direct" or "dlpack"."""
        return "direct" if isinstance(self._path, DirectPath) else "dlpack"

    def update(
        self,
        seq_lens: torch.Tensor,
        req_pool_indices: torch.Tensor,
        req_to_token: torch.Tensor,
        *,
        forward_mode: ForwardMode = ForwardMode.DECODE,
        num_draft_tokens: int | None = None,
        extend_seq_lens: torch.Tensor | None = None,
        max_total_tokens: int | None = None,
        written_lens: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        request_ids: torch.Tensor | None = None,
    ) -> None:
        """Refreshes the metadata of all backends.

        Args:
          seq_lens: int32 or int64 [bs], KV length of each request; bs may be anything up to the
            registered number of requests.
          req_pool_indices: int32 or int64 [bs], each request's row in the pool; clamped into it.
          req_to_token: int32 [pool_rows, pool_cols], KV slot of each token; rows may be apart.
            Tables get at most pool_cols columns.
          forward_mode: decides the rows, and which of the next arguments must be given.
          num_draft_tokens: in target verify, tokens to verify for each request.
          extend_seq_lens: int32 or int64 [bs], in draft extend and prefill, rows of each request.
          max_total_tokens: in draft extend and prefill, the rows that are written: padding rows
            get lengths of 0. None: all registered rows.
          written_lens: int32 or int64 [bs], leading tokens of request i that the tables of each of
            its rows hold already, at most those that are live: their columns are neither read nor
            written. `jaxnsa.precompute_decode_metadata` says when that is safe.
          max_new_tokens: with `written_lens` or `request_ids`, live tokens of any row that are not
            written, at most, which the path "direct" launches blocks for; more are written all the
            same.
          request_ids: int32 or int64 [bs], in place of `written_lens`, a number for each request
            that no other has, of those that live and those of the update before. A row that belongs
            to the same request as in the update before keeps what it has, all others are written
            anew, and so are all after an update without `request_ids`. Where neither it nor its
            length has changed, a GPU may write again what the update before wrote. As with
            `jaxnsa.BatchTracker`, `req_to_token` is the same pool in each update, and `invalidate`
            says where its entries for tokens that are written have changed. A wrong id leaves old
            columns in place and touches nothing else.

        Raises:
          ValueError, TypeError: an argument is wrong, or a registered tensor has been freed or
            resized; nothing has been written then.
          RuntimeError: values are to be validated while a CUDA graph is captured.
        """
        validate = settings().validate if overridden() else self._validate
        path = self._path
        direct = path if isinstance(path, DirectPath) and not validate else None
        if direct is not None:
            launched = direct.try_step(
                seq_lens,
                req_pool_indices,
                req_to_token,
                extend_seq_lens,
                forward_mode,
                num_draft_tokens,
                max_total_tokens,
                written_lens,
                max_new_tokens,
                request_ids,
            )
            if launched:
                return
        registered = self._registered
        registered.check_unchanged()
        device = registered.device
        lengths = checked_vector("seq_lens", seq_lens, device, None)
        bs = seq_lens.shape[0]
        rows = registered.rows(bs, forward_mode, num_draft_tokens, max_total_tokens)
        indices = checked_vector("req_pool_indices", req_pool_indices, device, bs)
        pool = checked_pool(req_to_token, device)
        extend = None
        if rows.rows_per_request is None:
            if extend_seq_lens is None:
                raise ValueError(f"extend_seq_lens: got None, expected a tensor in {forward_mode}")
            extend = checked_vector("extend_seq_lens", extend_seq_lens, device, bs)
        elif extend_seq_lens is not None:
            raise ValueError(f"extend_seq_lens: got a tensor, expected None in {forward_mode}")
        written = ids = None
        if written_lens is not None:
            written = checked_vector("written_lens", written_lens, device, bs)
        if request_ids is not None:
            if written_lens is not None:
                raise ValueError("request_ids: got a tensor, expected None with written_lens")
            ids = checked_vector("request_ids", request_ids, device, bs)
        most = argument_checks.max_new_tokens(
            max_new_tokens, written or ids, "written_lens or request_ids"
        )
        read = [lengths, indices, pool, extend, written, ids]
        registered.memory.check_apart([checked for checked in read if checked is not None])
        if validate:
            self._check_values(rows, lengths, indices, pool, extend)
        path.run(rows, lengths, indices, pool, extend, written, most, ids)
        if direct is not None:
            direct.report_declined()

    def invalidate(self, request_ids: torch.Tensor | None = None) -> None:
        """Has the next update with `request_ids` write rows anew: the pool's entries have changed.

        Args:
          request_ids: int32 or int64 [n], the requests of these rows, living or not; None: all.

        Raises:
          ValueError, TypeError: `request_ids` is no such tensor.
        """
        if request_ids is None:
            self._held_rows.invalidate(None)
            return
        checked_ids = checked_vector("request_ids", request_ids, self._registered.device, None)
        self._held_rows.invalidate(checked_ids)

    def _check_values(
        self, rows: Rows, lengths: Checked, indices: Checked, pool: Checked, extend: Checked | None
    ) -> None:
        on_cuda = self._registered.device.type == "cuda"
        if on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("validate: got True while a CUDA graph is captured, expected False")
        spec = self._registered.spec

        def values(checked: Checked | None) -> Any:
            return None if checked is None else checked.tensor.cpu().numpy()

        pool_rows, pool_columns = pool.shape
        check_inputs(
            Inputs(values(lengths), values(indices), np.empty((pool_rows, 0)), values(extend)),
            dataclasses.replace(spec, rows=rows, max_len=min(spec.max_len, pool_columns)),
            debug=False,
        )
