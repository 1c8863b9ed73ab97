// Calls of the library's functions in a row, which Python makes by one call.
#pragma once

#include <cstdint>

namespace spp {

enum class CallKind : int32_t { kLayer = 0, kChain = 1, kGate = 2, kMeans = 3, kLinear = 4 };

// Where a tensor lies in one of the memories that the calls are handed, in numbers; nowhere if `memory` is -1.
struct Place {
  int64_t memory, offset, count;
};

struct Memory {
  float* data;
  int64_t count;
};

// A call; the fields that its function doesn't have are 0.
struct ListedCall {
  CallKind kind;
  int32_t threads;
  const void* what;  // the layer's plan, the chain, the gate, or the linear layer
  const void* with;  // the layer's kernel config, or the chain's linear layer
  int64_t batch;     // or planes
  int64_t pixels;
  Place input, residual, output;
};

}  // namespace spp
