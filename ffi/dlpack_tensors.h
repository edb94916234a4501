// Tensors of Python objects, described by DLPack's C exchange API in tens of nanoseconds each.
// Functions here are called with Python's GIL held.
#ifndef JAXNSA_DLPACK_TENSORS_H_
#define JAXNSA_DLPACK_TENSORS_H_

#include <Python.h>

#include <cstdint>
#include <type_traits>

namespace jaxnsa {

// A tensor of at most two dimensions. Sizes and strides are in elements, 1 and 0 for a dimension
// that it does not have.
struct Tensor {
  uint64_t address;
  int32_t device_type;
  int32_t device_id;
  int32_t int_bits;  // of an element; 0 where elements are not signed integers
  int32_t dimensions;
  int64_t shape[2];
  int64_t strides[2];
};

static_assert(std::has_unique_object_representations_v<Tensor>);  // callers compare bytes

constexpr int32_t kDlpackCpu = 1;

// DLPackExchangeAPI of DLPack 1 (https://dmlc.github.io/dlpack/latest/c_api.html): functions of a
// framework that has tensors.
struct ExchangeApi;

// The functions in a capsule of a framework; null where they are of another major version.
const ExchangeApi* ExchangeApiOf(PyObject* capsule);

// Describes a tensor. Returns false where the framework cannot, or not as a `Tensor`; an exception
// that means anything else, such as an interrupt, is thrown as nanobind::python_error.
bool Describe(const ExchangeApi& api, PyObject* object, Tensor* out);

// The address past the storage of a tensor of PyTorch. DLPack does not say, and a storage can be
// resized under its tensors. Returns and throws as `Describe` does.
bool StorageEnd(PyObject* tensor, uint64_t* end);

// The stream that a framework currently uses on a device. Returns false where it has none.
bool CurrentStream(const ExchangeApi& api, const Tensor& on_device, void** stream);

}  // namespace jaxnsa

#endif  // JAXNSA_DLPACK_TENSORS_H_
