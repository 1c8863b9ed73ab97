// What the micro-kernel and the epilogue of an int8 layer are handed.
#pragma once

#include "int8_panel.h"

namespace spp {
namespace SPP_ISA {

// Some filters at a panel.
struct Int8Task {
  const int32_t* weight;  // [tile of filters][group of steps][filter of the tile][step of the group]
  const int32_t* panel;   // [step][pixel]
  int steps, steps_at_once;
  const int32_t* offset;  // one per filter, like the next two
  const float* multiplier;
  const float* bias;
  const Excess *excess, *excess_end;
  const uint8_t* residual;  // planes like the output's, at the first pixel; or null
  uint8_t* bytes;           // the output: the first filter's plane, at the first pixel; or null
  float* floats;            // likewise of an output of floats
  int64_t plane;            // pixels of a plane
  int filters, pixels;
  int32_t* sums;            // [filter][pixel]: over the columns so far, if `first` is false
  bool first, last;         // whether this is the first panel, or the last one
};

}  // namespace SPP_ISA
}  // namespace spp
