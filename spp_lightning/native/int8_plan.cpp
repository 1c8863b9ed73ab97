#include "int8_plan.h"

#include "int8_order.h"

namespace spp {
namespace {

constexpr int kMostSteps = 2;  // whose products meet in int16

// The weights of steps next to each other.
struct Block {
  int weights[kMostSteps][kColumnsOfStep] = {};

  Block() = default;
  Block(const int8_t* row, const int32_t* order, int steps) {
    for (int i = 0; i < steps * kColumnsOfStep; ++i)
      if (order[i] >= 0) weights[i / kColumnsOfStep][i % kColumnsOfStep] = row[order[i]];
  }
  Block(const Block& of, int step) { std::copy_n(of.weights[step], kColumnsOfStep, weights[0]); }
};

int32_t word_of(const int (&weights)[kColumnsOfStep]) {
  uint32_t word = 0;
  for (int i = 0; i < kColumnsOfStep; ++i) word |= (static_cast<uint32_t>(weights[i]) & 0xffu) << (8 * i);
  return static_cast<int32_t>(word);
}

// Whether nothing of a block is too much, as of most: the sums of its weights of either sign fit.
bool fits(int steps, const Block& block) {
  bool all = true;
  for (int first = 0; first < kColumnsOfStep; first += 2) {
    int positive = 0, both = 0;
    for (int s = 0; s < steps; ++s)
      for (int i = first; i < first + 2; ++i) {
        positive += std::max(0, block.weights[s][i]);
        both += block.weights[s][i];
      }
    all &= positive <= kMostInInt16 && positive - both <= kMostInInt16;
  }
  return all;
}

// Takes what is too much out of a block, and returns it. The sums of int16 have two columns of each step, at 2i and
// 2i + 1.
Block take_excess(int steps, Block& block) {
  Block excess;
  for (int first = 0; first < kColumnsOfStep; first += 2)
    for (int sign = -1; sign <= 1; sign += 2) {
      int sum = 0;
      for (int s = 0; s < steps; ++s)
        for (int i = first; i < first + 2; ++i) sum += std::max(0, sign * block.weights[s][i]);
      for (int s = 0; s < steps; ++s)
        for (int i = first; i < first + 2; ++i) {
          const int moved = std::clamp(sum - kMostInInt16, 0, std::max(0, sign * block.weights[s][i]));
          block.weights[s][i] -= sign * moved;
          excess.weights[s][i] += sign * moved;
          sum -= moved;
        }
    }
  return excess;
}

// How long products take, in instructions of a filter at two vectors of pixels.
double cost(const Int8Weights& weights) {
  const double step = weights.steps_at_once == 2 ? 6 : 7, excess = 13;
  return step * weights.words.size() + excess * weights.excess.size();
}

}  // namespace

Int8Plan::Int8Plan(const Geometry& g, const int32_t* numbers, int32_t num_columns, const int8_t* weight,
                   const float* multipliers, const float* biases, const Int8Scales& how, const Int8Kernel& by)
    : KeptColumns(g, numbers, num_columns), scales(how), kernel(&by),
      multiplier(multipliers, multipliers + g.filters), bias(g.filters, 0.0f) {
  if (biases != nullptr) bias.assign(biases, biases + g.filters);
  weights = pack(weight, 1);
  if (kernel->sums_in_int16) {
    Int8Weights joined = pack(weight, 2);
    if (cost(joined) < cost(weights)) weights = std::move(joined);
  }
  const int filters = group_filters();
  for (int f = 0; f < g.filters; ++f) {
    const int group = f / filters;
    const int8_t* row = weight + static_cast<size_t>(f % filters) * columns.size();
    int32_t sum = 0;
    for (int k = group_start[group]; k < group_start[group + 1]; ++k) sum += row[k];
    offset.push_back(-scales.input_zero * sum);
  }
}

Int8Weights Int8Plan::pack(const int8_t* weight, int at_once) const {
  Int8Weights made;
  made.steps_at_once = at_once;
  for (int g = 0; g < geometry.groups; ++g) {
    made.groups.push_back({made.order.size(), made.words.size(), static_cast<int32_t>(made.excess_start.size()), 0});
    order_group(weight, g, made);
    Int8Weights::Group& group = made.groups.back();
    group.steps = static_cast<int32_t>((made.order.size() - group.column) / kColumnsOfStep);
    for (int done = 0; done < group.steps; done += kernel->panel_steps)
      pack_panel(weight, made.order.data() + group.column + static_cast<size_t>(done) * kColumnsOfStep,
                 std::min(kernel->panel_steps, group.steps - done), made);
  }
  made.excess_start.push_back(static_cast<int32_t>(made.excess.size()));
  made.words.resize(made.words.size() + kMostLanes);
  return made;
}

// Appends the order of a conv group's columns.
void Int8Plan::order_group(const int8_t* weight, int group, Int8Weights& into) const {
  const int first = group_start[group], count = group_columns(group);
  if (kernel->sums_in_int16) {
    const auto stride = static_cast<int64_t>(columns.size());
    for (const int32_t k : order_columns(weight + first, group_filters(), stride, count, into.steps_at_once))
      into.order.push_back(k < 0 ? -1 : first + k);
    return;
  }
  for (int k = 0; k < count; ++k) into.order.push_back(first + k);
  while (into.order.size() % kColumnsOfStep != 0) into.order.push_back(-1);
}

void Int8Plan::pack_panel(const int8_t* weight, const int32_t* order, int steps_of_panel, Int8Weights& into) const {
  const int rows = kernel->tile_filters, at_once = into.steps_at_once, block_filters = kTilesOfBlock * rows;
  const int group = kernel->group_steps, padded = (steps_of_panel + group - 1) / group * group;
  const size_t begin = into.words.size();
  into.words.resize(begin + static_cast<size_t>(filter_tiles()) * rows * padded);
  for (int block = 0; block < group_filters(); block += block_filters) {
    into.excess_start.push_back(static_cast<int32_t>(into.excess.size()));
    // Step by step, so that excesses next to each other are those of different filters: their sums don't wait for
    // each other.
    for (int step = 0; step < steps_of_panel; step += at_once) {
      size_t place[kMostSteps];  // of the steps' words behind the filter's first one
      for (int s = 0; s < at_once; ++s)
        place[s] = static_cast<size_t>((step + s) / group * rows) * group + (step + s) % group;
      for (int f = block; f < std::min(group_filters(), block + block_filters); ++f) {
        Block kept(weight + f * columns.size(), order + static_cast<size_t>(step) * kColumnsOfStep, at_once);
        const bool exact = !kernel->sums_in_int16 || fits(at_once, kept);
        const Block over = exact ? Block() : take_excess(at_once, kept);
        int32_t* words = into.words.data() + begin + static_cast<size_t>(f / rows) * rows * padded + f % rows * group;
        for (int s = 0; s < at_once; ++s) {
          words[place[s]] = word_of(kept.weights[s]);
          if (exact) continue;
          Block part(over, s);
          while (word_of(part.weights[0]) != 0) {  // it may be too much for one product, too
            const Block rest = take_excess(1, part);
            into.excess.push_back({step + s, f - block, word_of(part.weights[0])});
            part = rest;
          }
        }
      }
    }
  }
}

}  // namespace spp
