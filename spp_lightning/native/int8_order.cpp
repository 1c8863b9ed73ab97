#include "int8_order.h"

#include <array>
#include <climits>
#include <cstddef>

namespace spp {
namespace {

// A large layer would take seconds otherwise.
constexpr int kCandidates = 64;  // columns that are tried as partners of one
constexpr int kFilters = 256;    // filters that decide

// Columns whose products are summed in int16, and the sums of their weights by sign, one per filter that decides.
struct Lane {
  std::vector<int32_t> columns;
  std::array<std::vector<int16_t>, 2> sums;
};

// In how many filters two lanes are too much for one.
int overflows(const Lane& a, const Lane& b) {
  int count = 0;
  for (int sign = 0; sign < 2; ++sign) {
    const int16_t *x = a.sums[sign].data(), *y = b.sums[sign].data();
    const std::size_t filters = a.sums[sign].size();
    for (std::size_t f = 0; f < filters; ++f) count += x[f] + y[f] > kMostInInt16;
  }
  return count;
}

void merge(Lane& into, const Lane& from) {
  into.columns.insert(into.columns.end(), from.columns.begin(), from.columns.end());
  for (int sign = 0; sign < 2; ++sign)
    for (std::size_t f = 0; f < into.sums[sign].size(); ++f) into.sums[sign][f] += from.sums[sign][f];
}

// Lanes of twice as many columns: each takes the best partner among the next ones that have none.
std::vector<Lane> pair_up(std::vector<Lane> lanes) {
  std::vector<Lane> made;
  std::vector<std::size_t> left(lanes.size());
  for (std::size_t i = 0; i < left.size(); ++i) left[i] = left.size() - 1 - i;  // the next one is the last
  while (left.size() > 1) {
    Lane lane = std::move(lanes[left.back()]);
    left.pop_back();
    std::size_t best = 0;
    int least = INT_MAX;
    for (std::size_t i = left.size(); i-- > 0 && left.size() - i <= kCandidates && least > 0;) {
      const int count = overflows(lane, lanes[left[i]]);
      if (count < least) least = count, best = i;
    }
    merge(lane, lanes[left[best]]);
    left.erase(left.begin() + static_cast<std::ptrdiff_t>(best));
    made.push_back(std::move(lane));
  }
  if (!left.empty()) made.push_back(std::move(lanes[left[0]]));
  return made;
}

}  // namespace

std::vector<int32_t> order_columns(const int8_t* weight, int filters, int64_t stride, int columns, int steps_at_once) {
  const int every = (filters + kFilters - 1) / kFilters;
  std::vector<Lane> lanes(columns);
  for (int k = 0; k < columns; ++k) {
    lanes[k].columns = {k};
    for (int f = 0; f < filters; f += every) {
      const int w = weight[f * stride + k];
      lanes[k].sums[0].push_back(static_cast<int16_t>(w > 0 ? w : 0));
      lanes[k].sums[1].push_back(static_cast<int16_t>(w < 0 ? -w : 0));
    }
  }
  for (int size = 1; size < 2 * steps_at_once; size *= 2) lanes = pair_up(std::move(lanes));
  // Two lanes lie next to each other: the first two columns of each make a step, the next two the step behind it.
  std::vector<int32_t> order;
  for (std::size_t i = 0; i < lanes.size(); i += 2)
    for (int step = 0; step < steps_at_once; ++step)
      for (std::size_t lane = i; lane < i + 2; ++lane)
        for (std::size_t at = 2 * static_cast<std::size_t>(step); at < 2 * static_cast<std::size_t>(step) + 2; ++at) {
          const bool is_there = lane < lanes.size() && at < lanes[lane].columns.size();
          order.push_back(is_there ? lanes[lane].columns[at] : -1);
        }
  return order;
}

}  // namespace spp
