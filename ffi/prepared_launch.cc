#include "prepared_launch.h"

#include <algorithm>
#include <cstring>

namespace jaxnsa {

namespace nb = nanobind;

bool PreparedLaunch::Unchanged::holds(const ExchangeApi& api) const {
  Tensor now;
  uint64_t bytes;
  return Describe(api, tensor.ptr(), &now) &&
         std::memcmp(&now, &description, sizeof(now)) == 0 &&
         StorageBytes(storage.ptr(), &bytes) && bytes == storage_bytes;
}

void PreparedLaunch::Watch(nb::handle exchange_api, nb::list tensors, bool unchanged,
                           std::vector<Span> written, int64_t min_columns) {
  const ExchangeApi* const api = ExchangeApiOf(exchange_api.ptr());
  if (api == nullptr) {
    declined_ = "the DLPack C exchange API is of another version than 1";
    return;
  }
  unchanged_.clear();
  for (nb::handle tensor : tensors) {
    Tensor described;
    if (!Describe(*api, tensor.ptr(), &described)) {
      declined_ = "a registered tensor cannot be described by DLPack";
      return;
    }
    on_device_ = described;
    if (!unchanged) continue;
    Unchanged kept{nb::borrow(tensor), described, tensor.attr("untyped_storage")(), 0};
    if (!StorageBytes(kept.storage.ptr(), &kept.storage_bytes)) {
      declined_ = "the storage of a registered tensor has no size";
      return;
    }
    unchanged_.push_back(std::move(kept));
  }
  written_ = std::move(written);
  min_columns_ = min_columns;
  api_ = api;
}

bool PreparedLaunch::TryLaunch(const Rows& rows, nb::handle seq_lens, nb::handle req_pool_indices,
                               nb::handle req_to_token, nb::handle extend_seq_lens,
                               nb::handle written_lens, int32_t max_new_tokens,
                               nb::handle request_ids) {
  if (api_ == nullptr) return false;
  if (!IsCurrentDevice(on_device_.device_id)) return Decline("another device is current");
  for (size_t k = 0; k < unchanged_.size(); ++k) {
    if (!unchanged_[k].holds(*api_)) {
      return Decline("registered tensor " + std::to_string(k) + " has changed");
    }
  }
  TakeRows(rows);
  if (rows.ragged() == extend_seq_lens.is_none()) {
    return Decline("extend_seq_lens: there, or not, against the forward mode");
  }
  if (!TakeVector(seq_lens, "seq_lens", rows.requests, &args_.rows.seq_lens) ||
      !TakeVector(req_pool_indices, "req_pool_indices", rows.requests, &args_.req_pool_indices) ||
      !TakePool(req_to_token) ||
      (rows.ragged() && !TakeVector(extend_seq_lens, "extend_seq_lens", rows.requests,
                                    &args_.rows.extend_seq_lens))) {
    return false;
  }
  args_.max_new_tokens = max_new_tokens;
  args_.written_lens = {};
  if (!written_lens.is_none() &&
      !TakeVector(written_lens, "written_lens", rows.requests, &args_.written_lens)) {
    return false;
  }
  args_.tracker.request_ids = {};
  if (!request_ids.is_none() &&
      !TakeVector(request_ids, "request_ids", rows.requests, &args_.tracker.request_ids)) {
    return false;
  }
  Stream stream;
  if (!CurrentStream(*api_, on_device_, &stream)) return Decline("there is no current stream");
  Run(stream);
  return true;
}

void PreparedLaunch::Launch(Stream stream, const Rows& rows, Vector seq_lens,
                            Vector req_pool_indices, const CheckedPool& pool,
                            std::optional<Vector> extend_seq_lens,
                            std::optional<Vector> written_lens, int32_t max_new_tokens,
                            std::optional<Vector> request_ids) {
  TakeRows(rows);
  args_.rows.seq_lens = seq_lens;
  args_.req_pool_indices = req_pool_indices;
  args_.pool = Pool::Of(reinterpret_cast<const int32_t*>(pool.address), pool.rows, pool.stride);
  args_.max_len = static_cast<int32_t>(std::min<int64_t>(max_len_, pool.columns));
  if (extend_seq_lens) args_.rows.extend_seq_lens = *extend_seq_lens;
  args_.written_lens = written_lens.value_or(Vector{});
  args_.max_new_tokens = max_new_tokens;
  args_.tracker.request_ids = request_ids.value_or(Vector{});
  Run(stream);
}

void PreparedLaunch::Run(Stream stream) {
  has_tracked_ = has_tracked_ || args_.tracker.request_ids.data != nullptr;
  // Before the first step that tracks there is nothing to forget; a graph may be replayed after it.
  args_.tracker.advances =
      args_.tracker.rows != nullptr && (has_tracked_ || IsCapturing(stream));
  FusedMetadata(stream, args_);
}

void PreparedLaunch::TakeRows(const Rows& rows) {
  args_.rows = rows;
  if (flash_mla_.empty()) return;
  const auto held = flash_mla_.find(args_.schedules.flash_mla.items(rows));
  args_.flash_mla = held == flash_mla_.end() ? nullptr : held->second;
}

bool PreparedLaunch::DescribeInput(nb::handle object, const char* name, int32_t dimensions,
                                   Tensor* out) {
  if (Describe(*api_, object.ptr(), out) && out->dimensions == dimensions &&
      out->device_type == on_device_.device_type && out->device_id == on_device_.device_id) {
    return true;
  }
  return Decline(std::string(name) + ": DLPack does not describe it as expected");
}

bool PreparedLaunch::TakeVector(nb::handle object, const char* name, int64_t size, Vector* out) {
  Tensor tensor;
  if (!DescribeInput(object, name, 1, &tensor)) return false;
  if ((tensor.int_bits != 32 && tensor.int_bits != 64) || tensor.shape[0] != size ||
      (size > 1 && tensor.strides[0] != 1) || (size > 0 && tensor.address == 0)) {
    return Decline(std::string(name) + ": of another type, size or stride than expected");
  }
  *out = {reinterpret_cast<const void*>(tensor.address), tensor.int_bits / 8};
  return IsReadable(object, name, tensor.address, tensor.address + size * out->itemsize);
}

bool PreparedLaunch::TakePool(nb::handle object) {
  constexpr const char* kName = "req_to_token";
  Tensor tensor;
  if (!DescribeInput(object, kName, 2, &tensor)) return false;
  const int64_t rows = tensor.shape[0], columns = tensor.shape[1], stride = tensor.strides[0];
  if (tensor.int_bits != 32 || rows < 1 || columns < min_columns_ || tensor.address == 0 ||
      (columns > 1 && tensor.strides[1] != 1) || (rows > 1 && stride < columns)) {
    return Decline("req_to_token: of another type, shape or stride than expected");
  }
  args_.pool = Pool::Of(reinterpret_cast<const int32_t*>(tensor.address), rows, stride);
  args_.max_len = static_cast<int32_t>(std::min<int64_t>(max_len_, columns));
  const auto span = static_cast<uint64_t>((rows - 1) * stride + columns) * sizeof(int32_t);
  return IsReadable(object, kName, tensor.address, tensor.address + span);
}

bool PreparedLaunch::IsReadable(nb::handle tensor, const char* name, uint64_t begin,
                                uint64_t end) {
  if (begin == end) return true;
  uint64_t storage_end;
  if (!StorageEnd(tensor.ptr(), &storage_end) || storage_end < end) {
    return Decline(std::string(name) + ": was freed");
  }
  const auto next =
      std::upper_bound(written_.begin(), written_.end(), begin,
                       [](uint64_t address, const Span& span) { return address < span.second; });
  if (next == written_.end() || end <= next->first) return true;
  return Decline(std::string(name) + ": touches memory that is written");
}

}  // namespace jaxnsa
