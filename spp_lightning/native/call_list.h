// Calls of the library's functions in a row, which Python makes by one call.
#pragma once

#include <cstdint>

namespace spp {

enum class CallKind : int32_t {
  kLayer = 0,
  kChain = 1,
  kGate = 2,
  kMeans = 3,
  kLinear = 4,
  kPool = 5,
  kNorm = 6,
  kConcat = 7,
  kAdd = 8,
  kInt8Layer = 9,
  kInt8Rounding = 10,
  kInt8Pool = 11,
};

// Where a tensor lies in one of the memories that the calls are handed: its first byte and its numbers, which are
// floats, or uint8 where the call's function takes that. Nowhere if `memory` is -1.
struct Place {
  int64_t memory, offset, count;
};

struct Memory {
  uint8_t* data;
  int64_t bytes;
};

struct EpilogueOp;

// Pools and norms of planes of floats, which are then rounded to uint8.
struct Int8Rounding {
  const EpilogueOp* ops;
  int32_t count;
  float inverse;  // 1 / scale
  int32_t zero;
};

// A call; the fields that its function doesn't have are 0.
struct ListedCall {
  CallKind kind;
  int32_t threads;
  const void* what;  // the layer's plan, the chain, the gate, the linear layer, the norm, the pool, or the rounding
  const void* with;  // the layer's kernel config, the chain's linear layer, or the norm's channels that are read
  int64_t batch;     // or planes
  int64_t height, width;
  Place input, residual, output;  // the residual is a sum's other tensor, too
  const Place* parts;             // of a concatenation, in the place of the input
  int64_t num_parts;
};

}  // namespace spp
