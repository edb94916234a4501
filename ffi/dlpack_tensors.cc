#include "dlpack_tensors.h"

#include <nanobind/nanobind.h>

namespace jaxnsa {

// DLTensor of DLPack 1.
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

struct ExchangeApi {
  uint32_t major;
  uint32_t minor;
  const ExchangeApi* older;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  // These return 0, or -1 with a Python exception set.
  int (*describe)(void* object, DlTensor* tensor);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** stream);
};

namespace {

constexpr uint8_t kDlpackInt = 0;

// Whether the exception that is set is a framework's answer that it cannot do something. Clears it
// then; throws any other.
bool IsRefusal() {
  for (PyObject* const type : {PyExc_RuntimeError, PyExc_TypeError, PyExc_ValueError,
                               PyExc_BufferError, PyExc_AttributeError}) {
    if (PyErr_ExceptionMatches(type)) {
      PyErr_Clear();
      return true;
    }
  }
  nanobind::raise_python_error();
}

// What a method without arguments returns; null, with an exception set, where it fails.
nanobind::object Call(PyObject* object, PyObject* method) {
  return nanobind::steal(PyObject_CallMethodNoArgs(object, method));
}

}  // namespace

const ExchangeApi* ExchangeApiOf(PyObject* capsule) {
  void* const pointer = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (pointer == nullptr) nanobind::raise_python_error();
  const auto* const api = static_cast<const ExchangeApi*>(pointer);
  return api->major == 1 ? api : nullptr;
}

bool Describe(const ExchangeApi& api, PyObject* object, Tensor* out) {
  DlTensor from;
  if (api.describe(object, &from) != 0) return !IsRefusal();
  if (from.dimensions > 2 || from.strides == nullptr) return false;
  out->address = reinterpret_cast<uint64_t>(from.data) + from.byte_offset;
  out->device_type = from.device_type;
  out->device_id = from.device_id;
  out->int_bits = from.type_code == kDlpackInt && from.lanes == 1 ? from.bits : 0;
  out->dimensions = from.dimensions;
  for (int k = 0; k < 2; ++k) {
    out->shape[k] = k < from.dimensions ? from.shape[k] : 1;
    out->strides[k] = k < from.dimensions ? from.strides[k] : 0;
  }
  return true;
}

bool StorageEnd(PyObject* tensor, uint64_t* end) {
  static PyObject* const kStorage = PyUnicode_InternFromString("untyped_storage");
  static PyObject* const kAddress = PyUnicode_InternFromString("data_ptr");
  const nanobind::object storage = Call(tensor, kStorage);
  const nanobind::object address = storage ? Call(storage.ptr(), kAddress) : storage;
  if (!address) return !IsRefusal();
  const Py_ssize_t bytes = PyObject_Size(storage.ptr());
  if (bytes < 0) return !IsRefusal();
  *end = nanobind::cast<uint64_t>(address) + bytes;
  return true;
}

bool CurrentStream(const ExchangeApi& api, const Tensor& on_device, void** stream) {
  *stream = nullptr;
  if (on_device.device_type == kDlpackCpu) return true;
  if (api.current_stream(on_device.device_type, on_device.device_id, stream) == 0) return true;
  return !IsRefusal();
}

}  // namespace jaxnsa
