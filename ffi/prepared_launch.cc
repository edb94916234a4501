#include "prepared_launch.h"

#include <nanobind/stl/tuple.h>

#include <algorithm>

namespace jaxnsa {

namespace nb = nanobind;

namespace {

constexpr size_t kMostKnownRows = 4096;
constexpr const char* kSeqLens = "seq_lens";

// An int of Python, or None: -1. Returns false for anything else, bools and what is negative or
// past int32 among it.
bool TakeNumber(nb::handle object, int64_t* out) {
  if (object.is_none()) {
    *out = -1;
    return true;
  }
  if (!PyLong_CheckExact(object.ptr())) return false;
  int overflows;
  *out = PyLong_AsLongAndOverflow(object.ptr(), &overflows);
  return overflows == 0 && *out >= 0 && *out <= INT32_MAX;
}

}  // namespace

void PreparedLaunch::Watch(nb::handle exchange_api, nb::handle tensor, nb::list registered,
                           nb::object handles_of, std::vector<Span> written,
                           int64_t min_columns) {
  const ExchangeApi* const api = ExchangeApiOf(exchange_api.ptr());
  if (api == nullptr) {
    declined_ = "the DLPack C exchange API is of another version than 1";
    return;
  }
  if (!Describe(*api, tensor.ptr(), &on_device_)) {
    declined_ = "a registered tensor cannot be described by DLPack";
    return;
  }
  if (registered.size() > 0 && !registered_.Take(registered, handles_of)) {
    declined_ = "a registered tensor cannot be looked at through LibTorch's C ABI";
    return;
  }
  written_ = std::move(written);
  min_columns_ = min_columns;
  api_ = api;
}

bool PreparedLaunch::TryLaunch(const Rows& rows, nb::handle seq_lens, nb::handle req_pool_indices,
                               nb::handle req_to_token, nb::handle extend_seq_lens) {
  Tensor lengths;
  return LooksAtTensors() && DescribeInput(seq_lens, kSeqLens, 1, &lengths) &&
         LaunchRows(rows, lengths, seq_lens, req_pool_indices, req_to_token, extend_seq_lens,
                    nb::none(), kMaxLen, nb::none());
}

bool PreparedLaunch::TryStep(nb::handle seq_lens, nb::handle req_pool_indices,
                             nb::handle req_to_token, nb::handle extend_seq_lens,
                             nb::handle forward_mode, nb::handle num_draft_tokens,
                             nb::handle max_total_tokens, nb::handle written_lens,
                             nb::handle max_new_tokens, nb::handle request_ids) {
  Tensor lengths;
  if (!LooksAtTensors() || !DescribeInput(seq_lens, kSeqLens, 1, &lengths)) return false;
  const bool may_hold_columns = !written_lens.is_none() || !request_ids.is_none();
  int64_t most_new;
  if (!TakeNumber(max_new_tokens, &most_new) || (most_new >= 0 && !may_hold_columns)) {
    return Decline("max_new_tokens: of another type or value than expected");
  }
  if (!written_lens.is_none() && !request_ids.is_none()) {
    return Decline("request_ids: there with written_lens");
  }
  const Rows& rows =
      RowsOfStep(lengths.shape[0], forward_mode, num_draft_tokens, max_total_tokens);
  return LaunchRows(rows, lengths, seq_lens, req_pool_indices, req_to_token, extend_seq_lens,
                    written_lens,
                    static_cast<int32_t>(most_new < 0 ? kMaxLen : std::min(most_new, kMaxLen)),
                    request_ids);
}

const Rows& PreparedLaunch::RowsOfStep(int64_t requests, nb::handle forward_mode,
                                       nb::handle num_draft_tokens, nb::handle max_total_tokens) {
  int64_t drafts = -1, total = -1;
  const bool are_plain =
      TakeNumber(num_draft_tokens, &drafts) && TakeNumber(max_total_tokens, &total);
  const Step step{requests, forward_mode.ptr(), drafts, total};
  if (are_plain) {
    const auto known = known_rows_.find(step);
    if (known != known_rows_.end()) return known->second.rows;
  }
  const auto [rows, constants, is_kept] = nb::cast<std::tuple<Rows, uint64_t, bool>>(
      rows_of_(requests, forward_mode, num_draft_tokens, max_total_tokens));
  if (constants != 0) HoldFlashMla(args_.schedules.flash_mla.items(rows), constants);
  if (!is_kept || !are_plain) {
    return asked_rows_ = rows;
  }
  if (known_rows_.size() >= kMostKnownRows) known_rows_.clear();
  return (known_rows_[step] = {rows, nb::borrow(forward_mode)}).rows;
}

bool PreparedLaunch::LooksAtTensors() {
  if (api_ == nullptr) return false;
  if (!IsCurrentDevice(on_device_.device_id)) return Decline("another device is current");
  const size_t changed = registered_.FirstChanged();
  return changed == registered_.size() ||
         Decline("registered tensor " + std::to_string(changed) + " has changed");
}

bool PreparedLaunch::LaunchRows(const Rows& rows, const Tensor& seq_lens,
                                nb::handle seq_lens_object, nb::handle req_pool_indices,
                                nb::handle req_to_token, nb::handle extend_seq_lens,
                                nb::handle written_lens, int32_t max_new_tokens,
                                nb::handle request_ids) {
  if (rows.ragged() == extend_seq_lens.is_none()) {
    return Decline("extend_seq_lens: there, or not, against the forward mode");
  }
  Inputs inputs{};
  inputs.rows = rows;
  inputs.max_new_tokens = max_new_tokens;
  const int64_t requests = inputs.rows.requests;
  const auto take = [&](nb::handle object, const char* name, Vector* out) {
    return object.is_none() || TakeVector(object, name, requests, out);
  };
  Stream stream;
  if (!TakeDescribed(seq_lens, seq_lens_object, kSeqLens, requests, &inputs.rows.seq_lens) ||
      !TakeVector(req_pool_indices, "req_pool_indices", requests, &inputs.req_pool_indices) ||
      !TakePool(req_to_token, &inputs) ||
      !take(extend_seq_lens, "extend_seq_lens", &inputs.rows.extend_seq_lens) ||
      !take(written_lens, "written_lens", &inputs.written_lens) ||
      !take(request_ids, "request_ids", &inputs.request_ids)) {
    return false;
  }
  if (!CurrentStream(*api_, on_device_, &stream)) return Decline("there is no current stream");
  Run(stream, inputs);
  return true;
}

void PreparedLaunch::Launch(Stream stream, const Rows& rows, Vector seq_lens,
                            Vector req_pool_indices, const CheckedPool& pool,
                            std::optional<Vector> extend_seq_lens,
                            std::optional<Vector> written_lens, int32_t max_new_tokens,
                            std::optional<Vector> request_ids) {
  Inputs inputs{rows,
                req_pool_indices,
                Pool::Of(reinterpret_cast<const int32_t*>(pool.address), pool.rows, pool.stride),
                pool.columns,
                written_lens.value_or(Vector{}),
                max_new_tokens,
                request_ids.value_or(Vector{})};
  inputs.rows.seq_lens = seq_lens;
  inputs.rows.extend_seq_lens = extend_seq_lens.value_or(Vector{});
  Run(stream, inputs);
}

void PreparedLaunch::Run(Stream stream, const Inputs& inputs) {
  args_.rows = inputs.rows;
  args_.req_pool_indices = inputs.req_pool_indices;
  args_.pool = inputs.pool;
  args_.max_len = static_cast<int32_t>(std::min<int64_t>(max_len_, inputs.pool_columns));
  args_.written_lens = inputs.written_lens;
  args_.max_new_tokens = inputs.max_new_tokens;
  args_.tracker.request_ids = inputs.request_ids;
  if (!flash_mla_.empty()) {
    const auto held = flash_mla_.find(args_.schedules.flash_mla.items(inputs.rows));
    args_.flash_mla = held == flash_mla_.end() ? nullptr : held->second;
  }
  has_tracked_ = has_tracked_ || args_.tracker.request_ids.data != nullptr;
  // Before the first step that tracks there is nothing to forget; a graph may be replayed after it.
  args_.tracker.advances =
      args_.tracker.rows != nullptr && (has_tracked_ || IsCapturing(stream));
  FusedMetadata(stream, args_);
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
  return DescribeInput(object, name, 1, &tensor) && TakeDescribed(tensor, object, name, size, out);
}

bool PreparedLaunch::TakeDescribed(const Tensor& tensor, nb::handle object, const char* name,
                                   int64_t size, Vector* out) {
  if ((tensor.int_bits != 32 && tensor.int_bits != 64) || tensor.shape[0] != size ||
      (size > 1 && tensor.strides[0] != 1) || (size > 0 && tensor.address == 0)) {
    return Decline(std::string(name) + ": of another type, size or stride than expected");
  }
  *out = {reinterpret_cast<const void*>(tensor.address), tensor.int_bits / 8};
  return IsReadable(object, name, tensor.address, tensor.address + size * out->itemsize);
}

bool PreparedLaunch::TakePool(nb::handle object, Inputs* inputs) {
  constexpr const char* kName = "req_to_token";
  Tensor tensor;
  if (!DescribeInput(object, kName, 2, &tensor)) return false;
  const int64_t rows = tensor.shape[0], columns = tensor.shape[1], stride = tensor.strides[0];
  if (tensor.int_bits != 32 || rows < 1 || columns < min_columns_ || tensor.address == 0 ||
      (columns > 1 && tensor.strides[1] != 1) || (rows > 1 && stride < columns)) {
    return Decline("req_to_token: of another type, shape or stride than expected");
  }
  inputs->pool = Pool::Of(reinterpret_cast<const int32_t*>(tensor.address), rows, stride);
  inputs->pool_columns = columns;
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
