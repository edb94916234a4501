// The Python module of a library: its XLA FFI handlers as capsules, and its computations for
// callers that are not XLA. jaxnsa/implementations/native_library.py says what Python sees.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "computations.h"
#include "dlpack_tensors.h"
#include "prepared_launch.h"
#include "schedule_arguments.h"
#include "xla/ffi/api/c_api.h"
#include "xla_handlers.h"

namespace jaxnsa {
namespace {

namespace nb = nanobind;

// Address and bytes of an element.
using VectorTuple = std::pair<uint64_t, int32_t>;

// Address, rows, elements from row to row, columns.
using PoolTuple = std::tuple<uint64_t, int64_t, int64_t, int64_t>;

// Source, rows, columns, elements from row to row in the destinations.
using CopyTuple = std::tuple<uint64_t, int64_t, int64_t, int64_t>;

int32_t* Pointer(uint64_t address) { return reinterpret_cast<int32_t*>(address); }

Stream StreamOf(uint64_t handle) { return reinterpret_cast<Stream>(handle); }

Vector VectorOf(const VectorTuple& vector) { return {Pointer(vector.first), vector.second}; }

// A field by its name, which Python took from the same description.
Field FieldOf(const std::string& name) {
  for (int field = 0; field < kFields; ++field) {
    if (name == kFieldDescriptions[field].name) return static_cast<Field>(field);
  }
  throw std::invalid_argument("field: got " + name + ", expected one of NSAMetadata");
}

nb::list FieldNamesAndExtents() {
  nb::list fields;
  for (const FieldDescription& field : kFieldDescriptions) {
    fields.append(nb::make_tuple(field.name, field.extent_name));
  }
  return fields;
}

nb::dict HandlerCapsules() {
  nb::dict capsules;
  for (const XlaHandler& handler : XlaHandlers()) {
    capsules[handler.name] = nb::capsule(reinterpret_cast<void*>(handler.handler));
  }
  return capsules;
}

// Every kernel that direct callers launch.
void LoadAllKernels() {
  LoadFusedMetadata();
  LoadCopy();
  LoadFillDraftExtendMetadata();
}

Rows RowsOf(int32_t requests, int32_t count, int32_t rows_per_request, int32_t added_tokens,
            bool prefill) {
  return {requests, count, rows_per_request, added_tokens, prefill, {}, {}};
}

void Prepare(PreparedLaunch* self, nb::list backends, nb::dict strides, nb::dict tokens_per_column,
             nb::dict slots_per_page, int32_t max_len, int32_t max_total_keys,
             int32_t nsa_index_topk, int32_t index_kpool, const Numbers& paged_mqa,
             const Numbers& topk_plan, const Numbers& flash_mla, const std::string& tail,
             bool requests_are_items, const std::vector<int32_t>& backend_offsets) {
  const auto args = std::make_unique<FusedMetadataArguments>();
  if (backends.size() < 1 || backends.size() > kMaxBackends) {
    throw std::invalid_argument("backends: got " + std::to_string(backends.size()) +
                                ", expected 1 to " + std::to_string(kMaxBackends));
  }
  args->num_backends = static_cast<int32_t>(backends.size());
  for (int32_t b = 0; b < args->num_backends; ++b) {
    for (auto [name, address] : nb::cast<nb::dict>(backends[b])) {
      const Field field = FieldOf(nb::cast<std::string>(name));
      ArrayOf(args->backends[b], field) = Pointer(nb::cast<uint64_t>(address));
    }
  }
  for (auto [name, tokens] : tokens_per_column) {
    TableLayout& table = args->tables[FieldOf(nb::cast<std::string>(name))];
    table.tokens_per_column = nb::cast<int32_t>(tokens);
    table.slots_per_page = nb::cast<int32_t>(slots_per_page[name]);
    table.stride = nb::cast<int64_t>(strides[name]);
  }
  args->nsa_index_topk = nsa_index_topk;
  args->index_kpool = index_kpool;
  args->schedules = SchedulesOf(paged_mqa, topk_plan, flash_mla);
  args->max_len = max_len;
  args->max_total_keys = max_total_keys;
  args->tail = FromName<Tail>("tail", tail, kTailNames);
  args->requests_are_items = requests_are_items;
  if (backend_offsets.size() != backends.size()) {
    throw std::invalid_argument("backend_offsets: got " + std::to_string(backend_offsets.size()) +
                                " numbers, expected " + std::to_string(backends.size()));
  }
  args->TakeOffsets(backend_offsets.data());
  new (self) PreparedLaunch(*args);
}

void LaunchPrepared(PreparedLaunch& self, uint64_t stream, const Rows& rows,
                    const VectorTuple& seq_lens, const VectorTuple& req_pool_indices,
                    const PoolTuple& pool, const std::optional<VectorTuple>& extend_seq_lens,
                    const std::optional<VectorTuple>& written_lens, int32_t max_new_tokens,
                    const std::optional<VectorTuple>& request_ids) {
  const auto [address, pool_rows, stride, columns] = pool;
  std::optional<Vector> extend, written, ids;
  if (extend_seq_lens) extend = VectorOf(*extend_seq_lens);
  if (written_lens) written = VectorOf(*written_lens);
  if (request_ids) ids = VectorOf(*request_ids);
  self.Launch(StreamOf(stream), rows, VectorOf(seq_lens), VectorOf(req_pool_indices),
              {address, pool_rows, stride, columns}, extend, written, max_new_tokens, ids);
}

nb::object DescribeTensors(nb::handle exchange_api, nb::list tensors) {
  const ExchangeApi* const api = ExchangeApiOf(exchange_api.ptr());
  struct Described {
    Tensor tensor;
    uint64_t storage_end;
  };
  std::vector<Described> described(tensors.size());
  if (api == nullptr) return nb::none();
  for (size_t k = 0; k < described.size(); ++k) {
    PyObject* const tensor = tensors[k].ptr();
    if (!Describe(*api, tensor, &described[k].tensor) ||
        !StorageEnd(tensor, &described[k].storage_end)) {
      return nb::none();
    }
  }
  return nb::bytes(described.data(), described.size() * sizeof(Described));
}

void CopyArrays(uint64_t stream, const std::vector<CopyTuple>& arrays,
                const std::vector<std::vector<uint64_t>>& destinations) {
  if (arrays.size() > kFields || destinations.size() > kMaxBackends) {
    throw std::invalid_argument("arrays: got " + std::to_string(arrays.size()) + " for each of " +
                                std::to_string(destinations.size()) +
                                " backends, expected at most " + std::to_string(kFields) +
                                " for each of " + std::to_string(kMaxBackends));
  }
  const auto args = std::make_unique<CopyArguments>();
  args->num_arrays = static_cast<int32_t>(arrays.size());
  args->num_backends = static_cast<int32_t>(destinations.size());
  for (size_t a = 0; a < arrays.size(); ++a) {
    const auto [source, rows, columns, stride] = arrays[a];
    args->arrays[a] = {Pointer(source), rows, columns, stride, 0};
    for (size_t b = 0; b < destinations.size(); ++b) {
      args->destinations[b][a] = Pointer(destinations[b].at(a));
    }
  }
  Copy(StreamOf(stream), *args);
}

void FillRows(uint64_t stream, const std::string& variant, const Rows& rows,
              int32_t nsa_index_topk, const VectorTuple& extend_seq_lens,
              const VectorTuple& seq_lens, uint64_t seqlens_expanded, uint64_t nsa_cache_seqlens,
              uint64_t total_tokens, uint64_t offsets) {
  FillDraftExtendMetadataArguments args{};
  args.rows = rows;
  args.rows.seq_lens = VectorOf(seq_lens);
  args.rows.extend_seq_lens = VectorOf(extend_seq_lens);
  args.nsa_index_topk = nsa_index_topk;
  args.lengths.seqlens_expanded = Pointer(seqlens_expanded);
  args.lengths.nsa_cache_seqlens = Pointer(nsa_cache_seqlens);
  args.total_tokens = Pointer(total_tokens);
  args.offsets = Pointer(offsets);
  FillDraftExtendMetadata(
      StreamOf(stream), FromName<DraftExtendVariant>("variant", variant, kDraftExtendVariantNames),
      args);
}

NB_MODULE(jaxnsa_native, module) {
  nb::set_leak_warnings(false);  // caches may live as long as the interpreter

  module.attr("fields") = FieldNamesAndExtents();
  module.attr("max_backends") = kMaxBackends;
  module.attr("xla_ffi_api") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  module.def("xla_handlers", &HandlerCapsules);
  module.def("load_kernels", &LoadAllKernels);
  module.def("describe_tensors", &DescribeTensors, nb::arg("exchange_api"), nb::arg("tensors"));
  module.def("copy", &CopyArrays, nb::arg("stream"), nb::arg("arrays"), nb::arg("destinations"));
  module.def("fill_draft_extend_metadata", &FillRows, nb::arg("stream"), nb::kw_only(),
             nb::arg("variant"), nb::arg("rows"), nb::arg("nsa_index_topk"),
             nb::arg("extend_seq_lens"), nb::arg("seq_lens"), nb::arg("seqlens_expanded"),
             nb::arg("nsa_cache_seqlens"), nb::arg("total_tokens"), nb::arg("offsets"));

  nb::class_<Rows>(module, "Rows")
      .def("__init__",
           [](Rows* self, int32_t requests, int32_t count, int32_t rows_per_request,
              int32_t added_tokens, bool prefill) {
             new (self) Rows(RowsOf(requests, count, rows_per_request, added_tokens, prefill));
           },
           nb::arg("requests"), nb::arg("count"), nb::arg("rows_per_request"),
           nb::arg("added_tokens"), nb::arg("prefill"));

  nb::class_<PreparedLaunch>(module, "PreparedLaunch")
      .def("__init__", &Prepare, nb::arg("backends"), nb::kw_only(), nb::arg("strides"),
           nb::arg("tokens_per_column"), nb::arg("slots_per_page"), nb::arg("max_len"),
           nb::arg("max_total_keys"), nb::arg("nsa_index_topk"), nb::arg("index_kpool"),
           nb::arg("paged_mqa"), nb::arg("topk_plan"), nb::arg("flash_mla"), nb::arg("tail"),
           nb::arg("requests_are_items"), nb::arg("backend_offsets"))
      .def("hold_flash_mla", &PreparedLaunch::HoldFlashMla, nb::arg("items"), nb::arg("address"))
      .def("watch", &PreparedLaunch::Watch, nb::arg("exchange_api"), nb::arg("tensor"),
           nb::kw_only(), nb::arg("registered"), nb::arg("handles_of").none(),
           nb::arg("written"), nb::arg("min_columns"))
      .def("track",
           [](PreparedLaunch& self, uint64_t held, int32_t rows) {
             self.Track(reinterpret_cast<HeldRow*>(held), rows);
           },
           nb::arg("held"), nb::arg("rows"))
      .def("ask_for_rows", &PreparedLaunch::AskForRows, nb::arg("rows_of"))
      .def("try_step", &PreparedLaunch::TryStep, nb::arg("seq_lens").none(),
           nb::arg("req_pool_indices").none(), nb::arg("req_to_token").none(),
           nb::arg("extend_seq_lens").none(), nb::arg("forward_mode").none(),
           nb::arg("num_draft_tokens").none(), nb::arg("max_total_tokens").none(),
           nb::arg("written_lens").none(), nb::arg("max_new_tokens").none(),
           nb::arg("request_ids").none())
      .def("try_launch", &PreparedLaunch::TryLaunch, nb::arg("rows"), nb::arg("seq_lens").none(),
           nb::arg("req_pool_indices").none(), nb::arg("req_to_token").none(),
           nb::arg("extend_seq_lens").none())
      .def("launch", &LaunchPrepared, nb::arg("stream"), nb::arg("rows"), nb::arg("seq_lens"),
           nb::arg("req_pool_indices"), nb::arg("pool"), nb::arg("extend_seq_lens").none(),
           nb::arg("written_lens") = nb::none(), nb::arg("max_new_tokens") = int32_t{kMaxLen},
           nb::arg("request_ids") = nb::none())
      .def_prop_ro("declined", &PreparedLaunch::declined);
}

}  // namespace
}  // namespace jaxnsa
