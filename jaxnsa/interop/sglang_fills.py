"""SGLang's steps: tensors of one backend filled that are given with each call."""

from typing import Any, NamedTuple

import torch

from jaxnsa import argument_checks
from jaxnsa.interop.fills import CheckedInputs, FillCache, Inputs
from jaxnsa.interop.launch_cache import key_of
from jaxnsa.interop.tensor_checks import check_memory, checked, checked_pool, checked_vector
from jaxnsa.metadata import ForwardMode
from jaxnsa.spec import MAX_LEN, Rows, Spec

_FILLS = FillCache()

_ARGUMENTS = {
    "nsa_cache_seqlens": "dsa_cache_seqlens",
    "nsa_cu_seqlens_k": "dsa_cu_seqlens_k",
    "page_indices": "page_table_1",
}
"""SGLang's names of fields, where they differ."""


class Step(NamedTuple):
    """The numbers of a step, as they came.

    Attributes:
      mode: how rows map to requests.
      bs: requests.
      max_len: columns of the page table, in tokens.
      dsa_index_topk: the indexer's top-k.
      physical_page_size: tokens in a page.
      next_n: in target verify, rows of each request.
      total_len, max_extend_len, max_total_len: in draft extend, the rows, the most of a request,
        and the most of all.
    """

    mode: ForwardMode
    bs: int
    max_len: int
    dsa_index_topk: int
    physical_page_size: int
    next_n: int | None = None
    total_len: int | None = None
    max_extend_len: int | None = None
    max_total_len: int | None = None

    def rows(self) -> Rows:
        """The rows of a step whose numbers are checked here."""
        integer = argument_checks.integer
        bs = integer("bs", self.bs, 0)
        if self.mode is ForwardMode.TARGET_VERIFY:
            return Rows.of(self.mode, bs, num_draft_tokens=integer("next_n", self.next_n, 1))
        if self.mode is ForwardMode.DECODE:
            return Rows.of(self.mode, bs)
        most = min(
            bs * integer("max_extend_len", self.max_extend_len, 0),
            integer("max_total_len", self.max_total_len, 0),
        )
        count = integer("total_len", self.total_len, 0, most) if bs else 0
        return Rows.of(self.mode, bs, max_total_tokens=count)


def fill(
    step: Step,
    inputs: Inputs,
    outputs: dict[str, Any],
    page_table_1: torch.Tensor | None,
    real_page_table: torch.Tensor | None,
) -> None:
    """Fills the outputs of a step, those of `outputs` by field and the others as they came."""
    if page_table_1 is not None:
        outputs["page_indices"] = page_table_1
    if step.physical_page_size != 1:
        outputs["real_page_table"] = real_page_table
    key = key_of(inputs[0], outputs.values(), (*step, *outputs))
    if _FILLS.try_launch(key, inputs):
        return
    rows = step.rows()
    bs = rows.requests
    seq_lens, req_pool_indices, req_to_token, extend_seq_lens = inputs
    inputs = (
        _first("seq_lens", seq_lens, bs),
        _first("req_pool_indices", req_pool_indices, bs),
        req_to_token,
        _first("extend_seq_lens", extend_seq_lens, bs),
    )
    if _FILLS.try_launch(key, inputs):
        return
    lengths = checked_vector("seq_lens", inputs[0], None, bs)
    device = lengths.tensor.device
    ragged = rows.rows_per_request is None
    read = CheckedInputs(
        lengths,
        checked_vector("req_pool_indices", inputs[1], device, bs),
        checked_pool(req_to_token, device),
        checked_vector("extend_seq_lens", inputs[3], device, bs) if ragged else None,
    )
    width = "max_len" if step.mode is ForwardMode.DECODE else "max_seqlen_k"
    columns = min(read.req_to_token.shape[1], MAX_LEN)
    spec = Spec(
        rows=rows,
        max_len=argument_checks.integer(width, step.max_len, 1, columns),
        nsa_index_topk=argument_checks.integer("dsa_index_topk", step.dsa_index_topk, 1),
        real_page_size=argument_checks.integer("physical_page_size", step.physical_page_size, 1),
        wide_table=page_table_1 is not None,
        tail="keep",
    )
    if not spec.wide_table and not spec.real_table:
        raise ValueError("page_table_1: got None, expected a tensor as physical_page_size is 1")
    written = {
        field: checked(
            _ARGUMENTS.get(field, field),
            outputs[field],
            device=device,
            dimensions=len(array.shape),
            at_least=array.shape,
        )
        for field, array in spec.shapes().items()
        if field in outputs
    }
    if (ctx_lens := outputs.get("paged_mqa_ctx_lens")) is not None:
        name, shape = "paged_mqa_ctx_lens_2d", (bs, rows.added_tokens)
        written["paged_mqa_ctx_lens"] = checked(
            name, ctx_lens, device=device, dimensions=2, shape=shape
        )
        if not ctx_lens.is_contiguous():
            raise ValueError(f"{name}: got strides {ctx_lens.stride()}, expected contiguous rows")
    _FILLS.launch(key, spec, read, [written], requests_are_items=True)


def _first(name: str, value: Any, bs: int) -> Any:
    """The first `bs` elements of a vector that has as many, contiguous; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dim() == 1 and len(value) >= bs:
        check_memory(name, value)
        return value[:bs].contiguous()
    return value
