// The XLA FFI handlers: they check what XLA hands over, operand by operand, and call the
// computation with it. They allocate nothing on the device and do not synchronise, so that XLA may
// capture them in a CUDA graph.
#include "xla_handlers.h"

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <memory>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "computations.h"
#include "schedule_arguments.h"
#include "xla/ffi/api/ffi.h"
#include "xla_stream.h"

namespace jaxnsa {
namespace {

namespace ffi = xla::ffi;

// Throws a problem, put together out of its parts, where a condition does not hold.
template <typename... Parts>
void Expect(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream problem;
  (problem << ... << parts);
  throw std::invalid_argument(problem.str());
}

template <typename... Name>
int32_t Int32(int64_t value, int64_t low, const Name&... name) {
  Expect(value >= low && value <= kInt32Max, name..., ": got ", value,
         ", expected an int32 of at least ", low);
  return static_cast<int32_t>(value);
}

// At most three dimensions, of which -1 stands for any.
class Shape {
 public:
  Shape(std::initializer_list<int64_t> sizes) {
    for (const int64_t size : sizes) Append(size);
  }
  explicit Shape(ffi::Span<const int64_t> sizes) {
    for (const int64_t size : sizes) Append(size);
  }

  // That of so many arrays, one behind the other.
  Shape Stacked(int64_t arrays) const {
    Shape stacked{arrays};
    for (const int64_t size : *this) stacked.Append(size);
    return stacked;
  }

  const int64_t* begin() const { return sizes_; }
  const int64_t* end() const { return sizes_ + count_; }

  friend std::ostream& operator<<(std::ostream& out, const Shape& shape) {
    out << "[";
    for (const int64_t& size : shape) {
      out << (&size == shape.begin() ? "" : ", ") << (size < 0 ? "*" : std::to_string(size));
    }
    return out << "]";
  }

 private:
  void Append(int64_t size) {
    Expect(count_ < std::size(sizes_), "shape: got more than ", count_, " dimensions");
    sizes_[count_++] = size;
  }

  int64_t sizes_[3];
  size_t count_ = 0;
};

// Expects the given dimensions and int32 elements.
void ExpectArray(const ffi::AnyBuffer& buffer, std::string_view name, const Shape& shape,
                 bool allow_int64 = false) {
  const ffi::DataType type = buffer.element_type();
  Expect(type == ffi::DataType::S32 || (type == ffi::DataType::S64 && allow_int64), name,
         ": got ", type, ", expected ", allow_int64 ? "int32 or int64" : "int32");
  const auto dims = buffer.dimensions();
  const auto fits = [](int64_t got, int64_t expected) { return expected < 0 || expected == got; };
  if (std::equal(dims.begin(), dims.end(), shape.begin(), shape.end(), fits)) return;
  Expect(false, name, ": got shape ", Shape(dims), ", expected ", shape);
}

int32_t* Data(const ffi::AnyBuffer& buffer) {
  return static_cast<int32_t*>(buffer.untyped_data());
}

Vector VectorOf(const ffi::AnyBuffer& buffer, std::string_view name, int64_t size) {
  ExpectArray(buffer, name, {size}, /*allow_int64=*/true);
  return {buffer.untyped_data(), buffer.element_type() == ffi::DataType::S64 ? 8 : 4};
}

// Expects `sources` operands, and behind them nothing or a destination for each result.
void ExpectOperands(const ffi::RemainingArgs& operands, size_t sources,
                    const ffi::RemainingRets& results) {
  Expect(operands.size() == sources || operands.size() == sources + results.size(),
         "operands: got ", operands.size(), ", expected ", sources, " and nothing or ",
         results.size(), " destinations");
}

// The function of a handler: what is thrown in it becomes XLA's error, with the handler's name.
template <typename Compute>
auto Handler(const char* name, Compute compute) {
  return [name, compute](auto... arguments) {
    try {
      compute(arguments...);
    } catch (const std::invalid_argument& error) {
      return ffi::Error::InvalidArgument(std::string(name) + ": " + error.what());
    } catch (const std::exception& error) {
      return ffi::Error::Internal(error.what());
    }
    return ffi::Error::Success();
  };
}

// Calls `launch(first, count)` for all backends, as many at once as a launch takes.
template <typename Launch>
void ForLaunches(int64_t num_backends, Launch launch) {
  for (int64_t first = 0; first < num_backends; first += kMaxBackends) {
    launch(first, static_cast<int32_t>(std::min<int64_t>(num_backends - first, kMaxBackends)));
  }
}

void PrefixSumOfBuffers(Stream stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> out,
                        std::string_view variant) {
  ExpectArray(x, "x", {-1});
  const int64_t n = x.dimensions()[0];
  ExpectArray(*out, "result", {n + 1});
  PrefixSum(stream, FromName<PrefixSumVariant>("variant", variant, kPrefixSumVariantNames), Data(x),
            n, Data(*out));
}

void FillDraftExtendMetadataOfBuffers(Stream stream, ffi::AnyBuffer extend_seq_lens,
                                      ffi::AnyBuffer seq_lens,
                                      ffi::Result<ffi::AnyBuffer> seqlens_expanded,
                                      ffi::Result<ffi::AnyBuffer> nsa_cache_seqlens,
                                      ffi::Result<ffi::AnyBuffer> total_tokens,
                                      ffi::Result<ffi::AnyBuffer> offsets, int64_t nsa_index_topk,
                                      std::string_view variant_name) {
  const auto variant =
      FromName<DraftExtendVariant>("variant", variant_name, kDraftExtendVariantNames);
  FillDraftExtendMetadataArguments args{};
  Rows& rows = args.rows;
  rows.seq_lens = VectorOf(seq_lens, "seq_lens", -1);
  const int64_t requests = seq_lens.dimensions()[0];
  rows.requests = Int32(requests, 0, "requests");
  rows.extend_seq_lens = VectorOf(extend_seq_lens, "extend_seq_lens", requests);
  ExpectArray(*seqlens_expanded, "seqlens_expanded", {-1});
  rows.count = Int32(seqlens_expanded->dimensions()[0], 0, "rows");
  ExpectArray(*nsa_cache_seqlens, "nsa_cache_seqlens", {rows.count});
  ExpectArray(*total_tokens, "total_tokens", {});
  // Only the variants that launch twice keep offsets.
  ExpectArray(*offsets, "offsets", {variant == DraftExtendVariant::kOptimized ? 0 : requests + 1});
  args.nsa_index_topk = Int32(nsa_index_topk, 1, "nsa_index_topk");
  args.lengths.seqlens_expanded = Data(*seqlens_expanded);
  args.lengths.nsa_cache_seqlens = Data(*nsa_cache_seqlens);
  args.total_tokens = Data(*total_tokens);
  args.offsets = Data(*offsets);
  args.clears_padding = true;
  FillDraftExtendMetadata(stream, variant, args);
}

// Operands: the arrays of the source, kv_lens where tables are copied as far as they are live, and
// the destinations where they are filled in place. Results: the arrays of every backend.
// `tokens_per_column` tells for each array what a column stands for, 0 for one copied in full.
void CopyOfBuffers(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                   int64_t num_backends, ffi::Span<const int64_t> tokens_per_column) {
  const size_t arrays = tokens_per_column.size();
  const bool live = std::any_of(tokens_per_column.begin(), tokens_per_column.end(),
                                [](int64_t tokens) { return tokens != 0; });
  const size_t sources = arrays + live;
  Int32(num_backends, 1, "num_backends");
  Expect(arrays >= 1 && arrays <= kFields, "tokens_per_column: got ", arrays,
         " arrays, expected 1 to ", kFields);
  Expect(results.size() == num_backends * arrays, "results: got ", results.size(),
         " arrays, expected ", arrays, " of each of ", num_backends, " backends");
  ExpectOperands(operands, sources, results);

  const auto args = std::make_unique<CopyArguments>();
  args->num_arrays = static_cast<int32_t>(arrays);
  int64_t rows = -1;
  for (size_t a = 0; a < arrays; ++a) {
    const ffi::AnyBuffer source = *operands.get<ffi::AnyBuffer>(a);
    const auto dims = source.dimensions();
    const std::string name = "source array " + std::to_string(a);
    const int64_t tokens = tokens_per_column[a];
    Expect(source.element_type() == ffi::DataType::S32, name, ": got ",
           source.element_type(), ", expected int32");
    Int32(tokens, 0, "tokens_per_column");
    if (tokens > 0) {
      ExpectArray(source, name, {rows, -1});  // the rows of the other table
      rows = dims[0];
      args->arrays[a] = {Data(source), dims[0], dims[1], dims[1], tokens};
    } else {
      const auto size = static_cast<int64_t>(source.element_count());
      args->arrays[a] = {Data(source), 1, size, size, 0};
    }
  }
  if (live) {
    const ffi::AnyBuffer kv_lens = *operands.get<ffi::AnyBuffer>(arrays);
    ExpectArray(kv_lens, "kv_lens", {rows});
    args->kv_lens = Data(kv_lens);
  }
  for (size_t k = 0; k < results.size(); ++k) {
    const ffi::AnyBuffer source = *operands.get<ffi::AnyBuffer>(k % arrays);
    const auto dims = source.dimensions();
    ExpectArray(**results.get<ffi::AnyBuffer>(k), "result " + std::to_string(k), Shape(dims));
  }
  ForLaunches(num_backends, [&](int64_t first, int32_t count) {
    args->num_backends = count;
    for (int32_t b = 0; b < count; ++b) {
      for (size_t a = 0; a < arrays; ++a) {
        args->destinations[b][a] = Data(**results.get<ffi::AnyBuffer>((first + b) * arrays + a));
      }
    }
    Copy(stream, *args);
  });
}

// The shape of one backend's array.
Shape ShapeOf(const FusedMetadataArguments& args, Field field) {
  const Rows& rows = args.rows;
  switch (kFieldDescriptions[field].extent) {
    case Extent::kRequests:
      return {rows.requests};
    case Extent::kRequestsPlus1:
      return {int64_t{rows.requests} + 1};
    case Extent::kRows:
      return {rows.count};
    case Extent::kRowsPlus1:
      return {int64_t{rows.count} + 1};
    case Extent::kTable:
      return {rows.prefill ? rows.requests : rows.count, args.columns(field)};
    case Extent::kKeys:
      return {args.max_total_keys};
    case Extent::kPagedMqaItems: {
      const PagedMqaSchedule& schedule = args.schedules.paged_mqa;
      return {schedule.items(rows), schedule.next_n(rows)};
    }
    case Extent::kMultiprocessorsPlus1:
      return {int64_t{args.schedules.paged_mqa.num_sms} + 1, 2};
    case Extent::kPlannedRows:
      return {int64_t{rows.count} + 1, 2};
    case Extent::kParts:
      return {args.schedules.flash_mla.num_sm_parts, 8};
    case Extent::kFlashmlaItemsPlus1:
      return {int64_t{args.schedules.flash_mla.items(rows)} + 1};
  }
  throw std::logic_error("a field of an unknown extent");
}

Numbers NumbersOf(ffi::Span<const int64_t> span) { return {span.begin(), span.end()}; }

// The arrays that are wanted, as attributes name them: indices of FIELDS in ascending order.
std::vector<Field> FieldsOf(ffi::Span<const int64_t> indices) {
  std::vector<Field> fields;
  fields.reserve(indices.size());
  for (const int64_t index : indices) {
    Expect(index > (fields.empty() ? -1 : fields.back()) && index < kFields,
           "fields: got index ", index, ", expected those of fields in ascending order");
    fields.push_back(static_cast<Field>(index));
  }
  return fields;
}

// A schedule is written to all of its arrays, without a look whether they are there.
void ExpectArraysOfSchedules(const Schedules& wanted, const std::vector<Field>& fields) {
  const auto expect = [&](const char* schedule, bool is_wanted,
                          std::initializer_list<Extent> extents) {
    for (const Extent extent : extents) {
      const bool is_there = std::any_of(fields.begin(), fields.end(), [&](Field field) {
        return kFieldDescriptions[field].extent == extent;
      });
      Expect(is_there == is_wanted, schedule, ": got ",
             is_wanted ? "numbers without arrays" : "arrays without numbers", ", expected both");
    }
  };
  expect("paged_mqa", wanted.paged_mqa.num_sms > 0,
         {Extent::kPagedMqaItems, Extent::kMultiprocessorsPlus1});
  expect("topk_plan", wanted.topk_plan.num_pairs > 0, {Extent::kPlannedRows});
  expect("flash_mla", wanted.flash_mla.num_sm_parts > 0,
         {Extent::kParts, Extent::kFlashmlaItemsPlus1});
}

// Operands: seq_lens, req_pool_indices, req_to_token, extend_seq_lens where rows_per_request is 0,
// written_lens where `written`, FlashMLA's arrays one behind the other where they are constant, and
// the destinations where they are filled in place. Results: the arrays `fields` of every backend in
// their order; stacked ones lead with [num_backends].
// `tokens_per_column` and `slots_per_page` tell for each of `fields` what a column stands for, 0
// where it is no table.
void FusedMetadataOfBuffers(Stream stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                            ffi::Span<const int64_t> field_indices,
                            ffi::Span<const int64_t> tokens_per_column,
                            ffi::Span<const int64_t> slots_per_page, int64_t count,
                            int64_t rows_per_request, int64_t added_tokens, bool prefill,
                            int64_t max_total_keys, int64_t max_len, int64_t nsa_index_topk,
                            int64_t index_kpool, ffi::Span<const int64_t> paged_mqa,
                            ffi::Span<const int64_t> topk_plan,
                            ffi::Span<const int64_t> flash_mla, std::string_view tail,
                            int64_t num_backends, bool stacked,
                            ffi::Span<const int64_t> backend_offsets, bool written,
                            int64_t max_new_tokens) {
  const auto args = std::make_unique<FusedMetadataArguments>();
  Rows& rows = args->rows;
  rows.count = Int32(count, 0, "rows");
  rows.rows_per_request = Int32(rows_per_request, 0, "rows_per_request");
  rows.added_tokens = Int32(added_tokens, 0, "added_tokens");
  rows.prefill = prefill;
  Expect(rows.ragged() || !prefill, "rows_per_request: got ", rows_per_request,
         ", expected 0 in prefill");
  args->max_total_keys = Int32(max_total_keys, 0, "max_total_keys");
  args->max_len = Int32(max_len, 1, "max_len");
  Expect(max_len <= kMaxLen, "max_len: got ", max_len, ", expected at most 2^30");
  args->nsa_index_topk = Int32(nsa_index_topk, 1, "nsa_index_topk");
  args->index_kpool = Int32(index_kpool, 1, "index_kpool");
  args->schedules =
      SchedulesOf(NumbersOf(paged_mqa), NumbersOf(topk_plan), NumbersOf(flash_mla));
  args->tail = FromName<Tail>("tail", tail, kTailNames);
  Int32(num_backends, 1, "num_backends");
  Expect(backend_offsets.size() == static_cast<size_t>(num_backends),
         "backend_offsets: got ", backend_offsets.size(), " numbers, expected ", num_backends);
  for (const int64_t offset : backend_offsets) Int32(offset, -kInt32Max, "backend_offsets");
  const std::vector<Field> fields = FieldsOf(field_indices);
  ExpectArraysOfSchedules(args->schedules, fields);
  args->max_new_tokens = Int32(max_new_tokens, 0, "max_new_tokens");
  const FlashMlaSchedule& flash_mla_schedule = args->schedules.flash_mla;
  const size_t inputs = 3 + rows.ragged() + written + flash_mla_schedule.constant();
  Expect(tokens_per_column.size() == fields.size() && slots_per_page.size() == fields.size(),
         "tokens_per_column, slots_per_page: got ", tokens_per_column.size(), " and ",
         slots_per_page.size(), " numbers, expected ", fields.size());
  const int64_t destinations = stacked ? 1 : num_backends;
  Expect(results.size() == fields.size() * destinations, "results: got ", results.size(),
         " arrays, expected ", fields.size(), " of each of ", destinations, " destinations");
  ExpectOperands(operands, inputs, results);
  args->is_fresh = operands.size() == inputs;

  const ffi::AnyBuffer seq_lens = *operands.get<ffi::AnyBuffer>(0);
  const ffi::AnyBuffer pool = *operands.get<ffi::AnyBuffer>(2);
  rows.seq_lens = VectorOf(seq_lens, "seq_lens", -1);
  const int64_t requests = seq_lens.dimensions()[0];
  rows.requests = Int32(requests, 0, "requests");
  args->req_pool_indices = VectorOf(*operands.get<ffi::AnyBuffer>(1), "req_pool_indices", requests);
  ExpectArray(pool, "req_to_token", {-1, -1});
  const int64_t pool_rows = pool.dimensions()[0], pool_columns = pool.dimensions()[1];
  Expect(pool_rows >= 1, "req_to_token: got no rows, expected at least one");
  Expect(pool_columns >= max_len, "req_to_token: got ", pool_columns,
         " columns, expected at least max_len, ", max_len);
  args->pool = Pool::Of(Data(pool), pool_rows, pool_columns);
  if (rows.ragged()) {
    rows.extend_seq_lens = VectorOf(*operands.get<ffi::AnyBuffer>(3), "extend_seq_lens", requests);
  } else {
    Expect(count == requests * rows_per_request, "rows: got ", count, ", expected ",
           rows_per_request, " for each of ", requests, " requests");
  }
  if (written) {
    Expect(args->tail == Tail::kKeep, "written_lens: got a vector, expected none with tail=",
           tail);
    args->written_lens =
        VectorOf(*operands.get<ffi::AnyBuffer>(3 + rows.ragged()), "written_lens", requests);
  }
  if (flash_mla_schedule.constant()) {
    const ffi::AnyBuffer constants = *operands.get<ffi::AnyBuffer>(inputs - 1);
    ExpectArray(constants, "flash_mla", {flash_mla_schedule.size(rows)});
    args->flash_mla = Data(constants);
  }

  std::vector<Backend> backends(num_backends, Backend{});
  for (size_t k = 0; k < results.size(); ++k) {
    const Field field = fields[k % fields.size()];
    const char* const name = kFieldDescriptions[field].name;
    if (kFieldDescriptions[field].extent == Extent::kTable) {
      const int64_t tokens = tokens_per_column[k % fields.size()];
      const int64_t slots = slots_per_page[k % fields.size()];
      args->tables[field].tokens_per_column =
          Int32(tokens, 1, name, ": tokens_per_column");
      args->tables[field].slots_per_page = Int32(slots, 1, name, ": slots_per_page");
      args->tables[field].stride = args->columns(field);
    }
    const ffi::AnyBuffer result = **results.get<ffi::AnyBuffer>(k);
    const Shape shape = ShapeOf(*args, field);
    ExpectArray(result, name, stacked ? shape.Stacked(num_backends) : shape);
    if (!stacked) {
      ArrayOf(backends[k / fields.size()], field) = Data(result);
      continue;
    }
    const int64_t size = static_cast<int64_t>(result.element_count()) / num_backends;
    for (int64_t b = 0; b < num_backends; ++b) {
      ArrayOf(backends[b], field) = Data(result) + b * size;
    }
  }
  ForLaunches(num_backends, [&](int64_t first, int32_t count) {
    args->num_backends = count;
    std::copy_n(backends.begin() + first, count, args->backends);
    args->TakeOffsets(backend_offsets.begin() + first);
    FusedMetadata(stream, *args);
  });
}

using Array = ffi::AnyBuffer;
using Integers = ffi::Span<const int64_t>;

auto Bind() { return ffi::Ffi::Bind().Ctx<XlaStream>(); }

}  // namespace

std::vector<XlaHandler> XlaHandlers() {
  XLA_FFI_DEFINE_HANDLER(prefix_sum, Handler("prefix_sum", PrefixSumOfBuffers),
                         Bind().Arg<Array>().Ret<Array>().Attr<std::string_view>("variant"),
                         {ffi::Traits::kCmdBufferCompatible});
  XLA_FFI_DEFINE_HANDLER(
      fill_draft_extend_metadata,
      Handler("fill_draft_extend_metadata", FillDraftExtendMetadataOfBuffers),
      Bind()
          .Arg<Array>()
          .Arg<Array>()
          .Ret<Array>()
          .Ret<Array>()
          .Ret<Array>()
          .Ret<Array>()
          .Attr<int64_t>("nsa_index_topk")
          .Attr<std::string_view>("variant"),
      {ffi::Traits::kCmdBufferCompatible});
  XLA_FFI_DEFINE_HANDLER(copy, Handler("copy", CopyOfBuffers),
                         Bind()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attr<int64_t>("num_backends")
                             .Attr<Integers>("tokens_per_column"),
                         {ffi::Traits::kCmdBufferCompatible});
  XLA_FFI_DEFINE_HANDLER(fused_metadata, Handler("fused_metadata", FusedMetadataOfBuffers),
                         Bind()
                             .RemainingArgs()
                             .RemainingRets()
                             .Attr<Integers>("fields")
                             .Attr<Integers>("tokens_per_column")
                             .Attr<Integers>("slots_per_page")
                             .Attr<int64_t>("rows")
                             .Attr<int64_t>("rows_per_request")
                             .Attr<int64_t>("added_tokens")
                             .Attr<bool>("prefill")
                             .Attr<int64_t>("max_total_keys")
                             .Attr<int64_t>("max_len")
                             .Attr<int64_t>("nsa_index_topk")
                             .Attr<int64_t>("index_kpool")
                             .Attr<Integers>("paged_mqa")
                             .Attr<Integers>("topk_plan")
                             .Attr<Integers>("flash_mla")
                             .Attr<std::string_view>("tail")
                             .Attr<int64_t>("num_backends")
                             .Attr<bool>("stacked")
                             .Attr<Integers>("backend_offsets")
                             .Attr<bool>("written")
                             .Attr<int64_t>("max_new_tokens"),
                         {ffi::Traits::kCmdBufferCompatible});
  return {{"jaxnsa_prefix_sum", prefix_sum},
          {"jaxnsa_fill_draft_extend_metadata", fill_draft_extend_metadata},
          {"jaxnsa_copy", copy},
          {"jaxnsa_fused_metadata", fused_metadata}};
}

}  // namespace jaxnsa
