// The consumers' schedules on the CPU, part by part and item by item, as
// jaxnsa/reference_schedules.py has them.
#ifndef JAXNSA_CPU_WRITE_SCHEDULES_H_
#define JAXNSA_CPU_WRITE_SCHEDULES_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "computations.h"

namespace jaxnsa {

// Lengths of a step's requests and rows.
struct StepLengths {
  std::vector<int32_t> requests;
  std::vector<int32_t> rows;
};

// [num_sms + 1, 2].
inline std::vector<int32_t> PagedMqaRows(const PagedMqaSchedule& schedule, int32_t next_n,
                                         const std::vector<int32_t>& lengths) {
  const int32_t units = schedule.units_per_segment(next_n);
  std::vector<int64_t> starts{0};
  for (const int32_t length : lengths) {
    starts.push_back(starts.back() + int64_t{schedule.segments(length)} * units);
  }
  const int64_t quotient = starts.back() / schedule.num_sms;
  const auto remainder = static_cast<int32_t>(starts.back() % schedule.num_sms);
  std::vector<int32_t> rows;
  for (int32_t s = 0; s <= schedule.num_sms; ++s) {
    const int64_t unit = schedule.first_unit(s, quotient, remainder);
    const auto item = std::upper_bound(starts.begin(), starts.end(), unit) - starts.begin() - 1;
    const bool is_past = item == static_cast<int64_t>(lengths.size());
    const PagedMqaRow row =
        schedule.row(static_cast<int32_t>(item), unit - starts[item],
                     is_past ? 0 : schedule.segments(lengths[item]), units);
    rows.insert(rows.end(), {row.item, row.segment});
  }
  return rows;
}

// As many rows of [rows + 1, 2] as the plan has.
inline std::vector<int32_t> TopkPlanRows(const TopkPlan& plan,
                                         const std::vector<int32_t>& lengths) {
  int32_t threshold = plan.thresholds[plan.num_pairs - 1];
  for (int k = plan.num_pairs - 1; k >= 0; --k) {
    const auto is_longer = [&](int32_t length) { return length > plan.thresholds[k]; };
    if (std::count_if(lengths.begin(), lengths.end(), is_longer) > plan.capacities[k]) break;
    threshold = plan.thresholds[k];
  }
  threshold = std::max(threshold, plan.floor);
  std::vector<int32_t> rows{threshold, 0};
  for (size_t row = 0; row < lengths.size(); ++row) {
    if (lengths[row] <= threshold) continue;
    rows.insert(rows.end(), {static_cast<int32_t>(row), lengths[row]});
    ++rows[1];
  }
  return rows;
}

struct FlashMlaArrays {
  std::vector<int32_t> schedule;    // [num_sm_parts, 8]
  std::vector<int32_t> num_splits;  // [items + 1]
};

inline FlashMlaArrays FlashMlaRows(const FlashMlaSchedule& schedule,
                                   const std::vector<int32_t>& lengths) {
  const auto items = static_cast<int32_t>(lengths.size());
  const int32_t overhead = schedule.fixed_overhead_blocks;
  int64_t total = 0;
  for (const int32_t length : lengths) total += schedule.blocks(length) + overhead;
  const int64_t payload = CeilDiv(total, schedule.num_sm_parts) + overhead;
  FlashMlaArrays arrays{{}, {0}};
  FlashMlaPlace place{0, 0, 0};
  for (int32_t part = 0; part < schedule.num_sm_parts; ++part) {
    const FlashMlaPlace begin = place;
    int64_t room = payload;
    while (place.item < items) {
      const int64_t cost = schedule.blocks(lengths[place.item]) - place.block + overhead;
      if (room < cost) {
        if (room <= overhead) break;
        place.block += static_cast<int32_t>(room - overhead);
        ++place.split;
        break;
      }
      arrays.num_splits.push_back(arrays.num_splits.back() + place.split + 1);
      room -= cost;
      place = {place.item + 1, 0, 0};
    }
    const int32_t end = schedule.end_item(place);
    int32_t row[8];
    schedule.Write(begin, place, end < 0 ? 0 : lengths[end], row);
    arrays.schedule.insert(arrays.schedule.end(), std::begin(row), std::end(row));
  }
  return arrays;
}

// Writes the schedules that are wanted to a backend.
inline void WriteSchedules(const FusedMetadataArguments& args, const StepLengths& lengths,
                           const ScheduleArrays& to) {
  const Schedules& wanted = args.schedules;
  const RowRules rules = args.row_rules();
  const auto store = [](const std::vector<int32_t>& values, int32_t* array) {
    std::copy(values.begin(), values.end(), array);
  };
  if (wanted.paged_mqa.num_sms > 0) {
    const int32_t next_n = wanted.paged_mqa.next_n(args.rows);
    std::vector<int32_t> items = next_n == 1 ? lengths.rows : lengths.requests;
    for (int32_t& length : items) length = PagedMqaSchedule::length(length, rules);
    store(PagedMqaRows(wanted.paged_mqa, next_n, items), to.paged_mqa_schedule);
  }
  if (wanted.topk_plan.num_pairs > 0) {
    std::vector<int32_t> plan = TopkPlanRows(wanted.topk_plan, lengths.rows);
    if (args.is_fresh) plan.resize(2 * (lengths.rows.size() + 1), 0);
    store(plan, to.topk_plan);
  }
  const FlashMlaSchedule& flash_mla = wanted.flash_mla;
  if (args.flash_mla != nullptr) {
    const int64_t rows = 8 * int64_t{flash_mla.num_sm_parts};
    std::copy_n(args.flash_mla, rows, to.flash_mla_schedule);
    std::copy_n(args.flash_mla + rows, flash_mla.size(args.rows) - rows, to.flash_mla_num_splits);
  } else if (flash_mla.num_sm_parts > 0) {
    std::vector<int32_t> items = flash_mla.dense() ? lengths.requests : lengths.rows;
    for (int32_t& length : items) {
      length = flash_mla.length(length, rules);
    }
    const FlashMlaArrays arrays = FlashMlaRows(flash_mla, items);
    store(arrays.schedule, to.flash_mla_schedule);
    store(arrays.num_splits, to.flash_mla_num_splits);
  }
}

}  // namespace jaxnsa

#endif  // JAXNSA_CPU_WRITE_SCHEDULES_H_
