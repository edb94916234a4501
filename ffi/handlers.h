// The XLA FFI handlers, the same for every platform: they check what XLA hands over, operand by
// operand, and call the platform's computation with it: Cpu (cpu.h) or Cuda (cuda.h).
#ifndef JAXNSA_HANDLERS_H_
#define JAXNSA_HANDLERS_H_

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "metadata.h"
#include "xla/ffi/api/ffi.h"

namespace jaxnsa {

namespace ffi = xla::ffi;

// Collects the first problem of a call.
class Checker {
 public:
  explicit Checker(std::string_view function) : function_(function) {}

  bool Expect(bool condition, const std::string& problem) {
    if (!condition && problem_.empty()) problem_ = std::string(function_) + ": " + problem;
    return condition;
  }

  // A buffer of a dtype and of the given dimensions; -1 takes any.
  bool ExpectArray(const ffi::AnyBuffer& buffer, const std::string& name,
                   const std::vector<int64_t>& shape, bool allow_int64 = false) {
    const bool int64 = buffer.element_type() == ffi::DataType::S64;
    const bool int32 = buffer.element_type() == ffi::DataType::S32;
    bool matches = int32 || (int64 && allow_int64);
    if (!Expect(matches, name + ": expected " + (allow_int64 ? "int32 or int64" : "int32"))) {
      return false;
    }
    const auto dims = buffer.dimensions();
    matches = dims.size() == shape.size();
    std::string got, expected;
    for (const int64_t d : dims) got += (got.empty() ? "" : ", ") + std::to_string(d);
    for (size_t k = 0; k < shape.size(); ++k) {
      expected += (k > 0 ? ", " : "") + (shape[k] < 0 ? "*" : std::to_string(shape[k]));
      matches = matches && (shape[k] < 0 || shape[k] == dims[k]);
    }
    return Expect(matches, name + ": got shape [" + got + "], expected [" + expected + "]");
  }

  Checker(const Checker&) = delete;
  bool ok() const { return problem_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument(problem_); }

 private:
  std::string_view function_;
  std::string problem_;
};

inline Vector VectorOf(const ffi::AnyBuffer& buffer) {
  return {buffer.untyped_data(), buffer.element_type() == ffi::DataType::S64 ? 8 : 4};
}

inline int32_t* Data(const ffi::AnyBuffer& buffer) {
  return static_cast<int32_t*>(buffer.untyped_data());
}

inline ffi::Error ErrorOf(const std::string& message) {
  return message.empty() ? ffi::Error::Success() : ffi::Error::Internal(message);
}

template <typename Variant, size_t kCount>
bool FindVariant(Checker& check, std::string_view name, const std::string_view (&names)[kCount],
                 Variant& variant) {
  std::string known;
  for (size_t k = 0; k < kCount; ++k) {
    if (name == names[k]) {
      variant = static_cast<Variant>(k);
      return true;
    }
    known += (k > 0 ? ", " : "") + std::string(names[k]);
  }
  return check.Expect(false, "variant: got " + std::string(name) + ", expected one of " + known);
}

template <typename Platform>
ffi::Error PrefixSumHandler(typename Platform::Stream stream, ffi::AnyBuffer x,
                            ffi::Result<ffi::AnyBuffer> out, std::string_view variant_name) {
  static constexpr std::string_view kNames[] = {"block_scan", "sequential", "blelloch"};
  Checker check("prefix_sum");
  PrefixSumVariant variant{};
  FindVariant(check, variant_name, kNames, variant);
  if (check.ExpectArray(x, "x", {-1})) check.ExpectArray(*out, "result", {x.dimensions()[0] + 1});
  if (!check.ok()) return check.error();
  return ErrorOf(Platform::PrefixSum(stream, variant, Data(x), x.dimensions()[0], Data(*out)));
}

template <typename Platform>
ffi::Error FillDraftExtendHandler(typename Platform::Stream stream, ffi::AnyBuffer extend_seq_lens,
                                  ffi::AnyBuffer seq_lens,
                                  ffi::Result<ffi::AnyBuffer> seqlens_expanded,
                                  ffi::Result<ffi::AnyBuffer> nsa_cache_seqlens,
                                  ffi::Result<ffi::AnyBuffer> total_tokens,
                                  ffi::Result<ffi::AnyBuffer> offsets, int64_t nsa_index_topk,
                                  std::string_view variant_name) {
  static constexpr std::string_view kNames[] = {"optimized", "adaptive", "basic"};
  Checker check("fill_draft_extend_metadata");
  DraftExtendVariant variant{};
  FindVariant(check, variant_name, kNames, variant);
  if (check.ExpectArray(seq_lens, "seq_lens", {-1}, true)) {
    const int64_t requests = seq_lens.dimensions()[0];
    check.ExpectArray(extend_seq_lens, "extend_seq_lens", {requests}, true);
    // Only the variants that launch twice keep offsets.
    check.ExpectArray(*offsets, "offsets",
                      {variant == DraftExtendVariant::kOptimized ? 0 : requests + 1});
    check.Expect(requests <= kInt32Max, "seq_lens: expected fewer than 2^31 requests");
  }
  if (check.ExpectArray(*seqlens_expanded, "seqlens_expanded", {-1})) {
    const int64_t capacity = seqlens_expanded->dimensions()[0];
    check.ExpectArray(*nsa_cache_seqlens, "nsa_cache_seqlens", {capacity});
    check.Expect(capacity <= kInt32Max, "seqlens_expanded: expected fewer than 2^31 rows");
  }
  check.ExpectArray(*total_tokens, "total_tokens", {});
  check.Expect(nsa_index_topk >= 1 && nsa_index_topk <= kInt32Max,
               "nsa_index_topk: expected an int32 of at least 1");
  if (!check.ok()) return check.error();
  DraftExtend args{};
  args.rows.requests = static_cast<int32_t>(seq_lens.dimensions()[0]);
  args.rows.count = static_cast<int32_t>(seqlens_expanded->dimensions()[0]);
  args.rows.nsa_index_topk = static_cast<int32_t>(nsa_index_topk);
  args.rows.seq_lens = VectorOf(seq_lens);
  args.rows.extend_seq_lens = VectorOf(extend_seq_lens);
  args.seqlens_expanded = Data(*seqlens_expanded);
  args.nsa_cache_seqlens = Data(*nsa_cache_seqlens);
  args.total_tokens = Data(*total_tokens);
  args.offsets = Data(*offsets);
  return ErrorOf(Platform::FillDraftExtend(stream, variant, args));
}

// Operands: the arrays of the source, kv_lens where tables are copied as far as they are live, and
// the destinations where they are filled in place. Results: the arrays of every backend. `tokens`
// says for each array how many tokens a column stands for, 0 for whole arrays.
template <typename Platform>
ffi::Error CopyMetadataHandler(typename Platform::Stream stream, ffi::RemainingArgs operands,
                               ffi::RemainingRets results, int64_t num_backends,
                               ffi::Span<const int64_t> tokens) {
  Checker check("fused_metadata_copy");
  const size_t arrays = tokens.size();
  const bool live = std::any_of(tokens.begin(), tokens.end(), [](int64_t t) { return t != 0; });
  const size_t sources = arrays + (live ? 1 : 0);
  const bool in_place = operands.size() > sources;
  check.Expect(num_backends >= 1, "num_backends: expected at least 1");
  check.Expect(arrays >= 1 && arrays <= kCopiedArrays, "tokens: expected 1 to 7 arrays");
  if (!check.ok()) return check.error();
  check.Expect(results.size() == num_backends * arrays, "results: expected num_backends sets");
  check.Expect(operands.size() == sources + (in_place ? results.size() : 0),
               "operands: expected the source, and nothing or all destinations");
  if (!check.ok()) return check.error();

  const auto args = std::make_unique<Copy>();
  int64_t rows = -1;
  for (size_t a = 0; a < arrays; ++a) {
    const ffi::AnyBuffer source = *operands.get<ffi::AnyBuffer>(a);
    const auto dims = source.dimensions();
    const std::string name = "source array " + std::to_string(a);
    check.Expect(source.element_type() == ffi::DataType::S32, name + ": expected int32");
    check.Expect(tokens[a] >= 0, "tokens: expected at least 0");
    if (tokens[a] > 0) {
      check.Expect(dims.size() == 2, name + ": expected [rows, columns]");
      if (!check.ok()) return check.error();
      rows = rows < 0 ? dims[0] : rows;
      check.Expect(dims[0] == rows, name + ": expected the rows of the other table");
      args->arrays[a] = {Data(source), dims[0], dims[1], dims[1], tokens[a]};
    } else {
      const auto size = static_cast<int64_t>(source.element_count());
      args->arrays[a] = {Data(source), 1, size, size, 0};
    }
  }
  if (live) {
    const ffi::AnyBuffer kv_lens = *operands.get<ffi::AnyBuffer>(arrays);
    check.ExpectArray(kv_lens, "kv_lens", {rows});
    args->kv_lens = Data(kv_lens);
  }
  for (size_t k = 0; k < results.size(); ++k) {
    const ffi::AnyBuffer source = *operands.get<ffi::AnyBuffer>(k % arrays);
    const auto dims = source.dimensions();
    check.ExpectArray(**results.get<ffi::AnyBuffer>(k), "result " + std::to_string(k),
                      std::vector<int64_t>(dims.begin(), dims.end()));
  }
  for (int64_t first = 0; check.ok() && first < num_backends; first += kMaxBackends) {
    args->num_backends = static_cast<int32_t>(std::min<int64_t>(num_backends - first, kMaxBackends));
    for (int64_t b = 0; b < args->num_backends; ++b) {
      for (size_t a = 0; a < arrays; ++a) {
        args->destinations[b][a] = Data(**results.get<ffi::AnyBuffer>((first + b) * arrays + a));
      }
    }
    const std::string problem = Platform::CopyMetadata(stream, *args);
    if (!problem.empty()) return ErrorOf(problem);
  }
  return check.ok() ? ffi::Error::Success() : check.error();
}

// Operands: seq_lens, req_pool_indices, req_to_token, extend_seq_lens where tokens_per_request is 0,
// and the destinations where they are filled in place. Results: the arrays of every backend in the
// order of Destination, without the tables that are not wanted; stacked ones lead with
// [num_backends].
template <typename Platform>
ffi::Error FusedMetadataHandler(typename Platform::Stream stream, ffi::RemainingArgs operands,
                                ffi::RemainingRets results, int64_t tokens_per_request,
                                int64_t added_tokens, int64_t max_len, int64_t nsa_index_topk,
                                int64_t real_page_size, bool wide_table, std::string_view tail,
                                int64_t num_backends, bool stacked) {
  static constexpr std::string_view kTails[] = {"copy", "zero", "keep"};
  Checker check("fused_metadata_precompute_and_broadcast");
  const auto args = std::make_unique<Fused>();
  const bool ragged = tokens_per_request == 0;
  const bool real_table = real_page_size > 1;
  const size_t inputs = ragged ? 4 : 3;
  const size_t arrays = 5 + wide_table + real_table;
  const auto in_range = [&](int64_t value, int64_t low, const char* name) {
    check.Expect(value >= low && value <= kInt32Max,
                 std::string(name) + ": expected an int32 of at least " + std::to_string(low));
  };
  in_range(tokens_per_request, 0, "tokens_per_request");
  in_range(added_tokens, 0, "added_tokens");
  in_range(max_len, 1, "max_len");
  check.Expect(max_len <= kMaxLen, "max_len: expected at most 2^30");
  in_range(nsa_index_topk, 1, "nsa_index_topk");
  in_range(real_page_size, 1, "real_page_size");
  in_range(num_backends, 1, "num_backends");
  const auto found = std::find(std::begin(kTails), std::end(kTails), tail);
  check.Expect(found != std::end(kTails), "tail: expected copy, zero or keep");
  if (!check.ok()) return check.error();
  args->tail = static_cast<Tail>(found - std::begin(kTails));
  check.Expect(results.size() == arrays * (stacked ? 1 : num_backends),
               "results: expected " + std::to_string(arrays) + " arrays of each backend");
  check.Expect(operands.size() == inputs || operands.size() == inputs + results.size(),
               "operands: expected the inputs, and nothing or all destinations");
  if (!check.ok()) return check.error();

  const ffi::AnyBuffer seq_lens = *operands.get<ffi::AnyBuffer>(0);
  const ffi::AnyBuffer indices = *operands.get<ffi::AnyBuffer>(1);
  const ffi::AnyBuffer pool = *operands.get<ffi::AnyBuffer>(2);
  if (!check.ExpectArray(seq_lens, "seq_lens", {-1}, true) ||
      !check.ExpectArray(pool, "req_to_token", {-1, -1})) {
    return check.error();
  }
  const int64_t requests = seq_lens.dimensions()[0];
  check.ExpectArray(indices, "req_pool_indices", {requests}, true);
  check.Expect(pool.dimensions()[0] >= 1, "req_to_token: expected at least one row");
  check.Expect(pool.dimensions()[1] >= max_len, "req_to_token: expected at least max_len columns");
  Rows& rows = args->rows;
  rows.seq_lens = VectorOf(seq_lens);
  if (ragged) {
    const ffi::AnyBuffer extend = *operands.get<ffi::AnyBuffer>(3);
    check.ExpectArray(extend, "extend_seq_lens", {requests}, true);
    rows.extend_seq_lens = VectorOf(extend);
  }
  const std::vector<int64_t> lead = stacked ? std::vector<int64_t>{num_backends}
                                            : std::vector<int64_t>{};
  const ffi::AnyBuffer expanded = **results.get<ffi::AnyBuffer>(2);
  check.Expect(expanded.dimensions().size() == lead.size() + 1,
               "seqlens_expanded: expected [rows]" + std::string(stacked ? " of each backend" : ""));
  if (!check.ok()) return check.error();
  const int64_t count = expanded.dimensions()[lead.size()];
  check.Expect(requests <= kInt32Max && count <= kInt32Max, "seq_lens: expected an int32 of rows");
  check.Expect(ragged || count == requests * tokens_per_request,
               "seqlens_expanded: expected tokens_per_request rows for each request");
  rows.requests = static_cast<int32_t>(requests);
  rows.count = static_cast<int32_t>(count);
  rows.tokens_per_request = static_cast<int32_t>(tokens_per_request);
  rows.added_tokens = static_cast<int32_t>(added_tokens);
  rows.nsa_index_topk = static_cast<int32_t>(nsa_index_topk);
  args->req_pool_indices = VectorOf(indices);
  args->req_to_token = Data(pool);
  args->pool_rows = pool.dimensions()[0];
  args->pool_stride = pool.dimensions()[1];
  args->max_len = static_cast<int32_t>(max_len);
  args->real_page_size = static_cast<int32_t>(real_page_size);
  args->page_indices_stride = max_len;
  args->real_page_table_stride = args->pages();

  struct Field {
    const char* name;
    int32_t* Destination::* array;
    std::vector<int64_t> shape;
  };
  std::vector<Field> fields = {
      {"cache_seqlens", &Destination::cache_seqlens, {requests}},
      {"cu_seqlens_k", &Destination::cu_seqlens_k, {requests + 1}},
      {"seqlens_expanded", &Destination::seqlens_expanded, {count}},
      {"nsa_cache_seqlens", &Destination::nsa_cache_seqlens, {count}},
      {"nsa_cu_seqlens_k", &Destination::nsa_cu_seqlens_k, {count + 1}},
  };
  if (wide_table) fields.push_back({"page_indices", &Destination::page_indices, {count, max_len}});
  if (real_table) {
    fields.push_back({"real_page_table", &Destination::real_page_table, {count, args->pages()}});
  }
  std::vector<Destination> backends(num_backends, Destination{});
  for (size_t k = 0; k < results.size(); ++k) {
    const Field& field = fields[k % arrays];
    const ffi::AnyBuffer result = **results.get<ffi::AnyBuffer>(k);
    std::vector<int64_t> shape = lead;
    shape.insert(shape.end(), field.shape.begin(), field.shape.end());
    if (!check.ExpectArray(result, field.name, shape)) return check.error();
    if (!stacked) {
      backends[k / arrays].*field.array = Data(result);
      continue;
    }
    const int64_t size = static_cast<int64_t>(result.element_count()) / num_backends;
    for (int64_t b = 0; b < num_backends; ++b) {
      backends[b].*field.array = Data(result) + b * size;
    }
  }
  if (!check.ok()) return check.error();
  for (int64_t first = 0; first < num_backends; first += kMaxBackends) {
    args->num_backends = static_cast<int32_t>(std::min<int64_t>(num_backends - first, kMaxBackends));
    std::copy_n(backends.begin() + first, args->num_backends, args->backends);
    const std::string problem = Platform::FusedMetadata(stream, *args);
    if (!problem.empty()) return ErrorOf(problem);
  }
  return ffi::Error::Success();
}

}  // namespace jaxnsa

// Defines the four handlers of a platform, with `binding` for what comes before the operands. XLA may
// capture them in a CUDA graph: they allocate nothing on the device and do not synchronise.
#define JAXNSA_DEFINE_HANDLERS(Platform, binding)                                              \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxnsa_prefix_sum, jaxnsa::PrefixSumHandler<Platform>,         \
                                binding.Arg<xla::ffi::AnyBuffer>()                             \
                                    .Ret<xla::ffi::AnyBuffer>()                                \
                                    .Attr<std::string_view>("variant"),                        \
                                {xla::ffi::Traits::kCmdBufferCompatible});                     \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxnsa_fill_draft_extend_metadata,                             \
                                jaxnsa::FillDraftExtendHandler<Platform>,                      \
                                binding.Arg<xla::ffi::AnyBuffer>()                             \
                                    .Arg<xla::ffi::AnyBuffer>()                                \
                                    .Ret<xla::ffi::AnyBuffer>()                                \
                                    .Ret<xla::ffi::AnyBuffer>()                                \
                                    .Ret<xla::ffi::AnyBuffer>()                                \
                                    .Ret<xla::ffi::AnyBuffer>()                                \
                                    .Attr<int64_t>("nsa_index_topk")                           \
                                    .Attr<std::string_view>("variant"),                        \
                                {xla::ffi::Traits::kCmdBufferCompatible});                     \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxnsa_fused_metadata_copy,                                    \
                                jaxnsa::CopyMetadataHandler<Platform>,                         \
                                binding.RemainingArgs()                                        \
                                    .RemainingRets()                                           \
                                    .Attr<int64_t>("num_backends")                             \
                                    .Attr<xla::ffi::Span<const int64_t>>("tokens"),            \
                                {xla::ffi::Traits::kCmdBufferCompatible});                     \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxnsa_fused_metadata_precompute_and_broadcast,                \
                                jaxnsa::FusedMetadataHandler<Platform>,                        \
                                binding.RemainingArgs()                                        \
                                    .RemainingRets()                                           \
                                    .Attr<int64_t>("tokens_per_request")                       \
                                    .Attr<int64_t>("added_tokens")                             \
                                    .Attr<int64_t>("max_len")                                  \
                                    .Attr<int64_t>("nsa_index_topk")                           \
                                    .Attr<int64_t>("real_page_size")                           \
                                    .Attr<bool>("wide_table")                                  \
                                    .Attr<std::string_view>("tail")                            \
                                    .Attr<int64_t>("num_backends")                             \
                                    .Attr<bool>("stacked"),                                    \
                                {xla::ffi::Traits::kCmdBufferCompatible});                     \
  /* The FFI API that this library was built with: major * 1000 + minor. */                    \
  extern "C" int jaxnsa_ffi_api_version() {                                                    \
    return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR;                                       \
  }

#endif  // JAXNSA_HANDLERS_H_
