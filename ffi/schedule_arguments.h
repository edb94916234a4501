// Schedules as Python hands them over: a list of numbers for each, empty where it is not wanted.
// They are written by `schedule_arguments` of jaxnsa/implementations/native_library.py.
#ifndef JAXNSA_SCHEDULE_ARGUMENTS_H_
#define JAXNSA_SCHEDULE_ARGUMENTS_H_

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "schedules.h"

namespace jaxnsa {

using Numbers = std::vector<int64_t>;

inline int32_t NumberOf(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return static_cast<int32_t>(value);
  throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) +
                              ", expected " + std::to_string(low) + " to " + std::to_string(high));
}

inline void ExpectNumbers(const char* name, const Numbers& numbers, size_t size) {
  if (numbers.size() == size) return;
  throw std::invalid_argument(std::string(name) + ": got " + std::to_string(numbers.size()) +
                              " numbers, expected " + std::to_string(size));
}

inline PagedMqaSchedule PagedMqaScheduleOf(const Numbers& numbers) {
  constexpr const char* kName = "paged_mqa";
  if (numbers.empty()) return {};
  ExpectNumbers(kName, numbers, 3);
  return {NumberOf(kName, numbers[0], 1, kMostParts),
          static_cast<PagedMqaLayout>(NumberOf(kName, numbers[1], 0, 3)), numbers[2] != 0};
}

inline TopkPlan TopkPlanOf(const Numbers& numbers) {
  constexpr const char* kName = "topk_plan";
  TopkPlan plan{};
  if (numbers.empty()) return plan;
  plan.num_pairs = NumberOf(kName, static_cast<int64_t>(numbers.size()) / 2, 1, kMaxPairs);
  ExpectNumbers(kName, numbers, 1 + 2 * plan.num_pairs);
  plan.floor = NumberOf(kName, numbers[0], 0, kInt32Max);
  for (int k = 0; k < plan.num_pairs; ++k) {
    plan.thresholds[k] = NumberOf(kName, numbers[1 + 2 * k], 0, kInt32Max);
    plan.capacities[k] = NumberOf(kName, numbers[2 + 2 * k], 0, kInt32Max);
  }
  return plan;
}

inline FlashMlaSchedule FlashMlaScheduleOf(const Numbers& numbers) {
  constexpr const char* kName = "flash_mla";
  if (numbers.empty()) return {};
  ExpectNumbers(kName, numbers, 4);
  return {NumberOf(kName, numbers[0], 1, kMostParts),
          static_cast<FlashMlaLengths>(NumberOf(kName, numbers[1], 0, 2)),
          NumberOf(kName, numbers[2], 0, kMostOverhead),
          static_cast<FlashMlaLayout>(NumberOf(kName, numbers[3], 0, 1))};
}

inline Schedules SchedulesOf(const Numbers& paged_mqa, const Numbers& topk_plan,
                             const Numbers& flash_mla) {
  return {PagedMqaScheduleOf(paged_mqa), TopkPlanOf(topk_plan), FlashMlaScheduleOf(flash_mla)};
}

}  // namespace jaxnsa

#endif  // JAXNSA_SCHEDULE_ARGUMENTS_H_
