#include "tensors.h"

#include <algorithm>
#include <cstring>

namespace jaxnsa {
namespace {

constexpr uint8_t kDlInt = 0;

bool DescribeThere(const Step& step, void* object, int32_t dimensions, Tensor* out) {
  const Tensor& there = *step.expected;
  return Describe(step.describe, object, out) && out->dimensions == dimensions &&
         out->device_type == there.device_type && out->device_id == there.device_id;
}

bool IsApart(const Step& step, uint64_t begin, uint64_t end) {
  const Span* const last = step.written + step.num_spans;
  const Span* const next = std::upper_bound(
      step.written, last, begin, [](uint64_t address, const Span& span) { return address < span.end; });
  return begin == end || next == last || end <= next->begin;
}

bool TakeVector(const Step& step, void* object, int64_t size, Vector* out) {
  Tensor tensor;
  if (!DescribeThere(step, object, 1, &tensor)) return false;
  if ((tensor.int_bits != 32 && tensor.int_bits != 64) || tensor.shape[0] != size) return false;
  if (size > 1 && tensor.strides[0] != 1) return false;
  if (size > 0 && tensor.start == 0) return false;
  out->data = reinterpret_cast<const void*>(tensor.start);
  out->itemsize = tensor.int_bits / 8;
  return IsApart(step, tensor.start, tensor.start + size * out->itemsize);
}

bool TakePool(const Step& step, void* object) {
  Tensor tensor;
  if (!DescribeThere(step, object, 2, &tensor)) return false;
  const int64_t rows = tensor.shape[0], columns = tensor.shape[1], pitch = tensor.strides[0];
  if (tensor.int_bits != 32 || rows < 1 || columns < step.min_columns || tensor.start == 0) {
    return false;
  }
  if ((columns > 1 && tensor.strides[1] != 1) || (rows > 1 && pitch < columns)) return false;
  Fused& fused = *step.fused;
  fused.req_to_token = reinterpret_cast<const int32_t*>(tensor.start);
  fused.pool_rows = rows;
  fused.pool_stride = pitch;
  fused.max_len = static_cast<int32_t>(std::min(step.max_len, columns));
  return IsApart(step, tensor.start, tensor.start + 4 * ((rows - 1) * pitch + columns));
}

}  // namespace

bool Describe(DescribeTensor describe, void* object, Tensor* out) {
  DlTensor from;
  if (describe(object, &from) != 0 || from.dimensions > 2 || !from.strides) return false;
  std::memset(out, 0, sizeof(Tensor));
  out->start = reinterpret_cast<uint64_t>(from.data) + from.byte_offset;
  out->device_type = from.device_type;
  out->device_id = from.device_id;
  out->int_bits = from.type_code == kDlInt && from.lanes == 1 ? from.bits : 0;
  out->dimensions = from.dimensions;
  for (int k = 0; k < 2; ++k) {
    out->shape[k] = k < from.dimensions ? from.shape[k] : 1;
    out->strides[k] = k < from.dimensions ? from.strides[k] : 0;
  }
  return true;
}

bool Take(const Step& step, const Rows& rows, const StepTensors& tensors) {
  for (int64_t k = 0; k < step.num_tensors; ++k) {
    Tensor now;
    if (!Describe(step.describe, step.objects[k], &now) ||
        std::memcmp(&now, &step.expected[k], sizeof(now)) != 0) {
      return false;
    }
  }
  Fused& fused = *step.fused;
  fused.rows = rows;
  if (rows.ragged() != (tensors.extend_seq_lens != nullptr)) return false;
  return TakeVector(step, tensors.seq_lens, rows.requests, &fused.rows.seq_lens) &&
         TakeVector(step, tensors.req_pool_indices, rows.requests, &fused.req_pool_indices) &&
         TakePool(step, tensors.req_to_token) &&
         (!rows.ragged() ||
          TakeVector(step, tensors.extend_seq_lens, rows.requests, &fused.rows.extend_seq_lens));
}

}  // namespace jaxnsa
