#include "registered_tensors.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace jaxnsa {

namespace nb = nanobind;

namespace {

// Functions of torch/csrc/inductor/aoti_torch/c/shim.h. They return 0, or 1 where they fail.
struct LibTorch {
  int32_t (*data_ptr)(void* tensor, void** address);
  int32_t (*storage_size)(void* tensor, int64_t* bytes);
  int32_t (*dim)(void* tensor, int64_t* dimensions);
  int32_t (*sizes)(void* tensor, int64_t** shape);
  int32_t (*strides)(void* tensor, int64_t** strides);
  int32_t (*dtype)(void* tensor, int32_t* dtype);
  int32_t (*delete_tensor)(void* tensor);
};

template <typename Function>
bool Find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

// Those of the LibTorch that Python has loaded; null where one is missing.
const LibTorch* Loaded() {
  static LibTorch torch;
  static const bool is_there = [] {
    void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return library != nullptr && Find(library, "aoti_torch_get_data_ptr", &torch.data_ptr) &&
           Find(library, "aoti_torch_get_storage_size", &torch.storage_size) &&
           Find(library, "aoti_torch_get_dim", &torch.dim) &&
           Find(library, "aoti_torch_get_sizes", &torch.sizes) &&
           Find(library, "aoti_torch_get_strides", &torch.strides) &&
           Find(library, "aoti_torch_get_dtype", &torch.dtype) &&
           Find(library, "aoti_torch_delete_tensor_object", &torch.delete_tensor);
  }();
  return is_there ? &torch : nullptr;
}

}  // namespace

RegisteredTensors::~RegisteredTensors() {
  for (const Registered& tensor : tensors_) Loaded()->delete_tensor(tensor.handle);
}

bool RegisteredTensors::Take(nb::list tensors, nb::object handles_of) {
  if (handles_of.is_none() || Loaded() == nullptr) return false;
  for (nb::handle capsule : handles_of(tensors)) {
    void* const handle = PyCapsule_GetPointer(capsule.ptr(), nullptr);
    if (handle == nullptr) nb::raise_python_error();
    tensors_.push_back({handle, {}});
  }
  return std::all_of(tensors_.begin(), tensors_.end(),
                     [](Registered& tensor) { return Look(tensor.handle, &tensor.state); });
}

size_t RegisteredTensors::FirstChanged() const {
  static_assert(std::has_unique_object_representations_v<State>);  // compared byte by byte
  State now;
  const auto changed =
      std::find_if_not(tensors_.begin(), tensors_.end(), [&now](const Registered& tensor) {
        return Look(tensor.handle, &now) && std::memcmp(&now, &tensor.state, sizeof(now)) == 0;
      });
  return changed - tensors_.begin();
}

bool RegisteredTensors::Look(void* tensor, State* out) {
  const LibTorch& torch = *Loaded();
  int64_t *shape, *strides;
  int32_t dtype;
  if (torch.data_ptr(tensor, &out->address) != 0 ||
      torch.storage_size(tensor, &out->storage_bytes) != 0 ||
      torch.dim(tensor, &out->dimensions) != 0 || out->dimensions > 2 ||
      torch.sizes(tensor, &shape) != 0 || torch.strides(tensor, &strides) != 0 ||
      torch.dtype(tensor, &dtype) != 0) {
    return false;
  }
  for (int64_t k = 0; k < 2; ++k) {
    out->shape[k] = k < out->dimensions ? shape[k] : 1;
    out->strides[k] = k < out->dimensions ? strides[k] : 0;
  }
  out->dtype = dtype;
  return true;
}

}  // namespace jaxnsa
