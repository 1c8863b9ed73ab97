// One update of a layer's pruning probabilities, but for Δ, bit for bit as rule.py has it in torch.
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>

#include "export.h"

namespace {

constexpr int kDigit = 11;  // bits of a key that one pass of the sort looks at
constexpr int kValues = 1 << kDigit;

// Unsigned numbers in the order of floats: the zeros are equal, NaNs equal and last.
template <typename Key, typename Float>
Key key_of(Float x) {
  static_assert(sizeof(Key) == sizeof(Float) && std::numeric_limits<Float>::is_iec559);
  constexpr Key sign = Key(1) << (8 * sizeof(Key) - 1);
  if (x != x) return ~Key(0);
  Key bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (bits == sign) bits = 0;
  return bits & sign ? ~bits : bits | sign;
}

// A stable radix sort, the lowest digits first. A digit that all keys share takes no pass.
template <typename Key, typename Float>
void sort(const Float* importance, const double* probability, int64_t count, int64_t* order) {
  struct Item {
    Key key;
    uint32_t group;
  };
  constexpr int kDigits = (8 * sizeof(Key) + kDigit - 1) / kDigit;
  const auto digit = [](Key key, int d) { return key >> d * kDigit & (kValues - 1); };
  const std::unique_ptr<Item[]> memory(new Item[2 * count]);
  Item *from = memory.get(), *to = from + count;
  uint32_t starts[kDigits][kValues] = {};  // how many keys have a digit, then where they go
  int64_t alive = 0;
  for (int64_t i = 0; i < count; ++i)
    if (!(probability[i] >= 1)) ++alive;
  for (int64_t i = 0, next = 0, pruned = alive; i < count; ++i) {
    if (probability[i] >= 1) {
      order[pruned++] = i;
      continue;
    }
    const Key key = key_of<Key>(importance[i]);
    from[next++] = {key, static_cast<uint32_t>(i)};
    for (int d = 0; d < kDigits; ++d) ++starts[d][digit(key, d)];
  }
  for (int d = 0; d < kDigits && alive > 0; ++d) {
    if (starts[d][digit(from[0].key, d)] == alive) continue;
    uint32_t start = 0;
    for (uint32_t& keys : starts[d]) start += std::exchange(keys, start);
    for (int64_t i = 0; i < alive; ++i) to[starts[d][digit(from[i].key, d)]++] = from[i];
    std::swap(from, to);
  }
  for (int64_t i = 0; i < alive; ++i) order[i] = from[i].group;
}

}  // namespace

// The groups in ascending order of importance, the pruned ones as if theirs were infinite.
// Importance is float, or double if `is_double`. Returns a status as
// in interface.cpp: 0, or 1 where memory runs out.
SPP_EXPORT int32_t spp_ascending_order(const void* importance, int32_t is_double,
                                       const double* probability, int64_t count, int64_t* order) {
  try {
    if (is_double)
      sort<uint64_t>(static_cast<const double*>(importance), probability, count, order);
    else
      sort<uint32_t>(static_cast<const float*>(importance), probability, count, order);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

// Adds a change to the probability of each group in `order`, in place. Only the first `needed`
// that reach 1 get there; if there are as many, all others go to 0.
SPP_EXPORT void spp_move(const int64_t* order, const double* change, int64_t count, int64_t needed,
                         double* probability) {
  int64_t reached = 0;
  for (int64_t i = 0; i < count; ++i) {
    double p = probability[order[i]] + change[i];
    if (p < 0) p = 0;
    if (p >= 1) p = ++reached > needed ? 0 : 1;
    probability[order[i]] = p;
  }
  if (reached < needed) return;
  for (int64_t i = 0; i < count; ++i)
    if (probability[order[i]] < 1) probability[order[i]] = 0;
}
