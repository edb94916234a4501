// Tensors of Python objects, described by DLPack's C exchange API in tens of nanoseconds each: what
// a step of an engine needs to know of them, without a call into Python. What is not as it should
// be is declined, and nothing done; Python looks again and says what it is.
#include <algorithm>
#include <cstring>

#include "metadata.h"

namespace jaxnsa {
namespace {

// DLTensor of DLPack 1 (https://dmlc.github.io/dlpack/latest/c_api.html).
struct DlTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t dimensions;
  uint8_t type_code;
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// dltensor_from_py_object_no_sync of DLPackExchangeAPI: 0, or -1 and a Python exception.
using Describe = int (*)(void* object, DlTensor* tensor);

constexpr uint8_t kDlInt = 0;

// A vector or matrix. Sizes and strides are in elements, 1 and 0 for a dimension that there is not.
struct Tensor {
  uint64_t start;
  int32_t device_type;
  int32_t device_id;
  int32_t int_bits;  // of an element; 0 where elements are no integers
  int32_t dimensions;
  int64_t shape[2];
  int64_t strides[2];

  bool Is(int32_t count, const Tensor& there) const {
    return dimensions == count && device_type == there.device_type && device_id == there.device_id;
  }
};

// Memory from one address to before another.
struct Span {
  uint64_t begin;
  uint64_t end;
};

// What is the same in all steps of an engine, and where the arguments of a launch go.
struct Step {
  Describe describe;
  int64_t num_tensors;
  void* const* objects;    // the tensors that are written
  const Tensor* expected;  // what they were, the first of them on the device of all
  int64_t num_spans;
  const Span* written;  // their memory, in order and apart
  int64_t min_columns;  // of the pool
  int64_t max_len;
  Fused* fused;
};

bool Describes(Describe describe, void* object, Tensor* out) {
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

bool IsApart(const Step& step, uint64_t begin, uint64_t end) {
  const Span* const last = step.written + step.num_spans;
  const Span* const next = std::upper_bound(
      step.written, last, begin, [](uint64_t address, const Span& span) { return address < span.end; });
  return begin == end || next == last || end <= next->begin;
}

bool TakesVector(const Step& step, void* object, int64_t size, Vector* out) {
  Tensor tensor;
  if (!Describes(step.describe, object, &tensor) || !tensor.Is(1, *step.expected)) return false;
  const bool wide = tensor.int_bits == 64;
  if ((!wide && tensor.int_bits != 32) || tensor.shape[0] != size) return false;
  if (size > 1 && tensor.strides[0] != 1) return false;
  if (size > 0 && tensor.start == 0) return false;
  out->data = reinterpret_cast<const void*>(tensor.start);
  out->is_wide = wide;
  return IsApart(step, tensor.start, tensor.start + size * (wide ? 8 : 4));
}

bool TakesPool(const Step& step, void* object) {
  Tensor tensor;
  if (!Describes(step.describe, object, &tensor) || !tensor.Is(2, *step.expected)) return false;
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
}  // namespace jaxnsa

extern "C" size_t jaxnsa_size_of_tensor() { return sizeof(jaxnsa::Tensor); }
extern "C" size_t jaxnsa_size_of_step() { return sizeof(jaxnsa::Step); }

// Describes tensors. Returns whether all could be.
extern "C" bool jaxnsa_describe_tensors(jaxnsa::Describe describe, int64_t count,
                                        void* const* objects, jaxnsa::Tensor* out) {
  return std::all_of(objects, objects + count, [&](void* object) {
    return jaxnsa::Describes(describe, object, out++);
  });
}

// Takes the tensors of a step as arguments of its launch: extend_seq_lens where rows are ragged,
// otherwise null. Returns whether everything is as it should be.
extern "C" bool jaxnsa_take_step(const jaxnsa::Step* step, const jaxnsa::Rows* rows, void* seq_lens,
                                 void* req_pool_indices, void* req_to_token,
                                 void* extend_seq_lens) {
  for (int64_t k = 0; k < step->num_tensors; ++k) {
    jaxnsa::Tensor now;
    if (!jaxnsa::Describes(step->describe, step->objects[k], &now) ||
        std::memcmp(&now, &step->expected[k], sizeof(now)) != 0) {
      return false;
    }
  }
  jaxnsa::Fused& fused = *step->fused;
  fused.rows = *rows;
  return rows->ragged() == (extend_seq_lens != nullptr) &&
         jaxnsa::TakesVector(*step, seq_lens, rows->requests, &fused.rows.seq_lens) &&
         jaxnsa::TakesVector(*step, req_pool_indices, rows->requests, &fused.req_pool_indices) &&
         jaxnsa::TakesPool(*step, req_to_token) &&
         (extend_seq_lens == nullptr ||
          jaxnsa::TakesVector(*step, extend_seq_lens, rows->requests, &fused.rows.extend_seq_lens));
}
