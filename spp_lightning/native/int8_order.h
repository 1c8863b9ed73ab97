// The order of columns in which few sums of int16 saturate.
#pragma once

#include <cstdint>
#include <vector>

namespace spp {

// Weights of one sign whose products with pixels of up to 255 fit into int16 together: 255 · 128 < 2¹⁵.
constexpr int kMostInInt16 = 128;

// The columns of a conv group in steps of four, of which two at a time are summed in int16: those of a step, or with
// `steps_at_once` = 2 also those of the step behind it. `weight` has `filters` rows, `stride` numbers apart. As many
// whole steps as there are columns for; -1 stands for no column.
std::vector<int32_t> order_columns(const int8_t* weight, int filters, int64_t stride, int columns, int steps_at_once);

}  // namespace spp
