// Tensors of PyTorch that are to stay as they are, looked at in some 20 nanoseconds each.
#ifndef JAXNSA_REGISTERED_TENSORS_H_
#define JAXNSA_REGISTERED_TENSORS_H_

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace jaxnsa {

// Looked at through LibTorch's C ABI
// (https://docs.pytorch.org/docs/stable/notes/libtorch_stable_abi.html). All functions are called
// with Python's GIL held.
class RegisteredTensors {
 public:
  RegisteredTensors() = default;
  RegisteredTensors(const RegisteredTensors&) = delete;
  RegisteredTensors& operator=(const RegisteredTensors&) = delete;
  ~RegisteredTensors();

  // Takes tensors, whose AtenTensorHandles `handles_of` makes, in capsules, for it to delete. Returns
  // false where that is None, where this process has no LibTorch with the functions that it takes,
  // or where these cannot tell what a tensor is.
  bool Take(nanobind::list tensors, nanobind::object handles_of);

  size_t size() const { return tensors_.size(); }

  // The first tensor that is not, or whose storage is not, what it was; `size()` if all are.
  size_t FirstChanged() const;

 private:
  // All that a launch depends on: an address belongs to one device.
  struct State {
    void* address;
    int64_t storage_bytes;
    int64_t dimensions;
    int64_t shape[2];
    int64_t strides[2];
    int64_t dtype;
  };
  struct Registered {
    void* handle;
    State state;
  };

  static bool Look(void* handle, State* out);

  std::vector<Registered> tensors_;
};

}  // namespace jaxnsa

#endif  // JAXNSA_REGISTERED_TENSORS_H_
