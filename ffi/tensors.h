// Tensors of Python objects, described by DLPack's C exchange API in tens of nanoseconds each: what
// a step of an engine needs to know of them, without a call into Python. What is not as it should
// be is declined, and nothing done; Python looks again and says what it is.
#ifndef JAXNSA_TENSORS_H_
#define JAXNSA_TENSORS_H_

#include <cstdint>

#include "metadata.h"

namespace jaxnsa {

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

constexpr int32_t kDlCpu = 1;

// Functions of DLPackExchangeAPI; they return 0, or -1 and a Python exception.
using DescribeTensor = int (*)(void* object, DlTensor* tensor);
using CurrentStream = int (*)(int32_t device_type, int32_t device_id, void** stream);

// A vector or matrix. Sizes and strides are in elements, 1 and 0 for a dimension that there is not.
struct Tensor {
  uint64_t start;
  int32_t device_type;
  int32_t device_id;
  int32_t int_bits;  // of an element; 0 where elements are no integers
  int32_t dimensions;
  int64_t shape[2];
  int64_t strides[2];
};

// Memory from one address to before another.
struct Span {
  uint64_t begin;
  uint64_t end;
};

// What is the same in all steps of an engine, and where the arguments of a launch go.
struct Step {
  DescribeTensor describe;
  CurrentStream current_stream;
  int64_t num_tensors;
  void* const* objects;    // the tensors that are written
  const Tensor* expected;  // what they were, the first of them on the device of all
  int64_t num_spans;
  const Span* written;  // their memory, in order and apart
  int64_t min_columns;  // of the pool
  int64_t max_len;
  Fused* fused;
};

// The tensors of a step, as Python objects.
struct StepTensors {
  void* seq_lens;
  void* req_pool_indices;
  void* req_to_token;
  void* extend_seq_lens;  // null unless rows are ragged
};

// Describes a tensor. Returns whether that worked.
bool Describe(DescribeTensor describe, void* object, Tensor* out);

// Takes tensors as arguments of a launch. Returns whether everything is as it should be.
bool Take(const Step& step, const Rows& rows, const StepTensors& tensors);

}  // namespace jaxnsa

#endif  // JAXNSA_TENSORS_H_
