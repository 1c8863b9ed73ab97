#include "int8_plan.h"

namespace spp {

Int8Plan::Int8Plan(const Geometry& g, const int32_t* numbers, int32_t num_columns, const int8_t* weight,
                   const float* multipliers, const float* biases, const Int8Scales& how, const Int8Kernel& by)
    : KeptColumns(g, numbers, num_columns), scales(how), kernel(&by),
      multiplier(multipliers, multipliers + g.filters), bias(g.filters, 0.0f) {
  if (biases != nullptr) bias.assign(biases, biases + g.filters);
  pack(weight);
  const int filters = group_filters();
  for (int f = 0; f < g.filters; ++f) {
    const int group = f / filters;
    const int8_t* row = weight + static_cast<size_t>(f % filters) * columns.size();
    int32_t sum = 0;
    for (int k = group_start[group]; k < group_start[group + 1]; ++k) sum += row[k];
    offset.push_back(-scales.input_zero * sum);
  }
}

// The weights of `count` columns: the first one gets the lowest bits.
int32_t Int8Plan::word(const int8_t* weight, int filter, int column, int count) const {
  const int bits = 32 / kernel->columns_at_once;
  uint32_t made = 0;
  for (int i = 0; i < count; ++i) {
    const int32_t w = weight[filter * columns.size() + column + i];
    made |= (static_cast<uint32_t>(w) & (bits == 16 ? 0xffffu : 0xffu)) << (bits * i);
  }
  return static_cast<int32_t>(made);
}

void Int8Plan::pack(const int8_t* weight) {
  const int rows = kernel->tile_filters, at_once = kernel->columns_at_once;
  size_t words = 0;
  for (int g = 0; g < geometry.groups; ++g) {
    group_weights.push_back(words);
    words += static_cast<size_t>(filter_tiles()) * rows * steps(g);
  }
  weights.reset(reinterpret_cast<int32_t*>(aligned_floats(words).release()));
  int32_t* out = weights.get();
  for (int g = 0; g < geometry.groups; ++g)
    for (int first = 0; first < filter_tiles() * rows; first += rows)
      for (int k = group_start[g]; k < group_start[g + 1]; k += at_once)
        for (int filter = first; filter < first + rows; ++filter)
          *out++ = filter < group_filters()
                       ? word(weight, filter, k, std::min(at_once, group_start[g + 1] - k))
                       : 0;
}

}  // namespace spp
