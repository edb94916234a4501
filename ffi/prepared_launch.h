// A launch of fused_metadata for an engine whose tensors stay the same from step to step.
#ifndef JAXNSA_PREPARED_LAUNCH_H_
#define JAXNSA_PREPARED_LAUNCH_H_

#include <nanobind/nanobind.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "computations.h"
#include "dlpack_tensors.h"
#include "registered_tensors.h"

namespace jaxnsa {

// Memory from one address to before another.
using Span = std::pair<uint64_t, uint64_t>;

// Everything that a launch needs but for a step's own arguments. All functions are called with
// Python's GIL held. Looking at a tensor may run Python, and with it other threads: a step's
// arguments come together before they are taken, and threads launch one after the other.
class PreparedLaunch {
 public:
  // A step's pool: address, rows, elements from row to row, columns.
  struct CheckedPool {
    uint64_t address;
    int64_t rows;
    int64_t stride;
    int64_t columns;
  };

  // `fixed` lacks a step's rows and inputs; its max_len is the most that a step writes, which
  // writes no more columns than its pool has.
  explicit PreparedLaunch(const FusedMetadataArguments& fixed)
      : args_(fixed), max_len_(fixed.max_len) {}

  // Lets launches copy FlashMLA's arrays of a constant schedule of so many items, which lie one
  // behind the other at an address. They compute those of other numbers of items.
  void HoldFlashMla(int32_t items, uint64_t address) {
    flash_mla_[items] = reinterpret_cast<const int32_t*>(address);
  }

  // Lets TryLaunch look at tensors by itself. It declines where one of `registered` has changed, and
  // always where RegisteredTensors does not take them with `handles_of`; where an input is not on
  // the device of `tensor` or touches `written`, memory in order and apart; and where the pool has
  // fewer columns than `min_columns`.
  void Watch(nanobind::handle exchange_api, nanobind::handle tensor, nanobind::list registered,
             nanobind::object handles_of, std::vector<Span> written, int64_t min_columns);

  // Lets launches keep track of what table rows hold, in memory that stays where it is, zeros at
  // first.
  void Track(HeldRow* held, int32_t rows) { args_.tracker = {held, rows, {}, false}; }

  // Lets TryStep ask for the rows of a step: `rows_of` takes its requests, forward mode,
  // num_draft_tokens and max_total_tokens, and returns Rows, the address of FlashMLA's arrays where
  // those are constant for them, otherwise 0, and whether this holds for every such step.
  void AskForRows(nanobind::object rows_of) { rows_of_ = std::move(rows_of); }

  // TryLaunch with the arguments of a step as Python has them. Throws what is wrong with its rows.
  bool TryStep(nanobind::handle seq_lens, nanobind::handle req_pool_indices,
               nanobind::handle req_to_token, nanobind::handle extend_seq_lens,
               nanobind::handle forward_mode, nanobind::handle num_draft_tokens,
               nanobind::handle max_total_tokens, nanobind::handle written_lens,
               nanobind::handle max_new_tokens, nanobind::handle request_ids);

  // Takes a step's tensors as they are and launches on their framework's current stream. Returns
  // false, having launched nothing, where anything is not as it should be: why is in `declined`.
  bool TryLaunch(const Rows& rows, nanobind::handle seq_lens, nanobind::handle req_pool_indices,
                 nanobind::handle req_to_token, nanobind::handle extend_seq_lens);

  // Launches on a stream with a step's inputs, which the caller has checked.
  void Launch(Stream stream, const Rows& rows, Vector seq_lens, Vector req_pool_indices,
              const CheckedPool& pool, std::optional<Vector> extend_seq_lens,
              std::optional<Vector> written_lens, int32_t max_new_tokens,
              std::optional<Vector> request_ids);

  // Why TryLaunch last declined.
  const std::string& declined() const { return declined_; }

 private:
  // What a step brings; data of a vector is null: there is none.
  struct Inputs {
    Rows rows;  // with its lengths
    Vector req_pool_indices;
    Pool pool;
    int64_t pool_columns;
    Vector written_lens;
    int32_t max_new_tokens;
    Vector request_ids;
  };

  void Run(Stream stream, const Inputs& inputs);
  bool Decline(std::string reason) {
    declined_ = std::move(reason);
    return false;
  }
  bool LooksAtTensors();
  const Rows& RowsOfStep(int64_t requests, nanobind::handle forward_mode,
                         nanobind::handle num_draft_tokens, nanobind::handle max_total_tokens);
  bool LaunchRows(const Rows& rows, const Tensor& seq_lens, nanobind::handle seq_lens_object,
                  nanobind::handle req_pool_indices, nanobind::handle req_to_token,
                  nanobind::handle extend_seq_lens, nanobind::handle written_lens,
                  int32_t max_new_tokens, nanobind::handle request_ids);
  bool DescribeInput(nanobind::handle object, const char* name, int32_t dimensions, Tensor* out);
  bool TakeVector(nanobind::handle object, const char* name, int64_t size, Vector* out);
  bool TakeDescribed(const Tensor& tensor, nanobind::handle object, const char* name, int64_t size,
                     Vector* out);
  bool TakePool(nanobind::handle object, Inputs* inputs);
  bool IsReadable(nanobind::handle tensor, const char* name, uint64_t begin, uint64_t end);

  // Of steps that were asked for: the rows, and what they follow from, held.
  struct KnownRows {
    Rows rows;
    nanobind::object forward_mode;
  };
  using Step = std::tuple<int64_t, PyObject*, int64_t, int64_t>;

  FusedMetadataArguments args_;
  const int32_t max_len_;
  nanobind::object rows_of_;
  std::map<Step, KnownRows> known_rows_;
  Rows asked_rows_;  // the last that are not to be known
  std::unordered_map<int32_t, const int32_t*> flash_mla_;  // by items
  const ExchangeApi* api_ = nullptr;
  RegisteredTensors registered_;
  Tensor on_device_;  // one on the device of all
  std::vector<Span> written_;
  int64_t min_columns_ = 1;
  bool has_tracked_ = false;  // whether a step's requests were known by their ids
  std::string declined_ = "there is no DLPack C exchange API";
};

}  // namespace jaxnsa

#endif  // JAXNSA_PREPARED_LAUNCH_H_
