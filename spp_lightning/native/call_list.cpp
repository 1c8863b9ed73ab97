#include "call_list.h"

#include <vector>

#include "guard.h"
#include "int8_interface.h"
#include "interface.h"

namespace spp {
namespace {

template <typename Number>
struct Numbers {
  Number* data;
  int64_t count;
};

template <typename Number>
Numbers<Number> find(const Place& place, const Memory* memories, int32_t count) {
  if (place.memory < 0) return {nullptr, 0};
  check(place.memory < count, "A call must name one of the memories.");
  const Memory& memory = memories[place.memory];
  constexpr int64_t kSize = sizeof(Number);
  check(place.offset >= 0 && place.count >= 0 && place.offset % kSize == 0 && place.offset <= memory.bytes &&
            place.count <= (memory.bytes - place.offset) / kSize,
        "The tensors of a call must lie in their memories.");
  return {reinterpret_cast<Number*>(memory.data + place.offset), place.count};
}

// The tensors of a concatenation of planes that have so many pixels in a batch.
const std::vector<ConcatPart>& find_parts(const ListedCall& call, int64_t pixels, const Memory* memories,
                                          int32_t count) {
  thread_local std::vector<ConcatPart> found;
  check(pixels > 0 && call.num_parts >= 0, "There must be pixels.");
  found.clear();
  for (int64_t i = 0; i < call.num_parts; ++i) {
    const auto part = find<float>(call.parts[i], memories, count);
    found.push_back({part.data, part.count, part.count / pixels});
  }
  return found;
}

Status run_int8_layer(const ListedCall& call, const Memory* memories, int32_t num_memories) {
  const auto& plan = deref(static_cast<const Int8Plan*>(call.what));
  const auto bytes = [&](const Place& place) { return find<uint8_t>(place, memories, num_memories); };
  const auto x = bytes(call.input), residual = bytes(call.residual);
  const auto forward = [&](void* y, int64_t count) {
    return spp_int8_forward(&plan, static_cast<const KernelConfig*>(call.with), x.data, x.count, residual.data,
                            residual.count, y, count);
  };
  if (plan.scales.is_quantised) {
    const auto y = bytes(call.output);
    return forward(y.data, y.count);
  }
  const auto y = find<float>(call.output, memories, num_memories);
  return forward(y.data, y.count);
}

Status run_int8_rounding(const ListedCall& call, const Memory* memories, int32_t num_memories) {
  const auto& to = deref(static_cast<const Int8Rounding*>(call.what));
  const auto x = find<float>(call.input, memories, num_memories);
  const auto y = find<uint8_t>(call.output, memories, num_memories);
  if (to.count == 0) return spp_int8_quantize(to.inverse, to.zero, call.threads, x.data, x.count, y.data, y.count);
  return spp_int8_post(to.ops, to.count, call.batch, static_cast<int32_t>(call.height),
                       static_cast<int32_t>(call.width), to.inverse, to.zero, call.threads, x.data, x.count, y.data,
                       y.count);
}

Status run_int8_pool(const ListedCall& call, const Memory* memories, int32_t num_memories) {
  const auto x = find<uint8_t>(call.input, memories, num_memories), y = find<uint8_t>(call.output, memories, num_memories);
  return spp_int8_max_pool(static_cast<const EpilogueOp*>(call.what), call.batch, static_cast<int32_t>(call.height),
                           static_cast<int32_t>(call.width), call.threads, x.data, x.count, y.data, y.count);
}

// Every function checks the numbers of elements for itself.
Status run(const ListedCall& call, const Memory* memories, int32_t num_memories) {
  if (call.kind == CallKind::kInt8Layer) return run_int8_layer(call, memories, num_memories);
  if (call.kind == CallKind::kInt8Rounding) return run_int8_rounding(call, memories, num_memories);
  if (call.kind == CallKind::kInt8Pool) return run_int8_pool(call, memories, num_memories);
  const auto linear = [](const void* layer) { return static_cast<const Linear*>(layer); };
  const auto at = [&](const Place& place) { return find<float>(place, memories, num_memories); };
  const auto y = at(call.output), x = at(call.input), residual = at(call.residual);
  const int64_t pixels = call.height * call.width;
  const auto parts = [&]() -> const std::vector<ConcatPart>& {
    return find_parts(call, call.batch * pixels, memories, num_memories);
  };
  switch (call.kind) {
    case CallKind::kLayer:
      return spp_forward(static_cast<const Plan*>(call.what), static_cast<const KernelConfig*>(call.with), x.data,
                         x.count, residual.data, residual.count, y.data, y.count);
    case CallKind::kChain:
      return spp_chain_forward(static_cast<const CheckedChain*>(call.what), x.data, x.count, residual.data,
                               residual.count, linear(call.with), y.data, y.count);
    case CallKind::kGate:
      return spp_gate(static_cast<const Gate*>(call.what), x.data, x.count, call.batch, pixels, call.threads, y.data,
                      y.count);
    case CallKind::kMeans:
      return spp_plane_means(x.data, x.count, call.batch, pixels, call.threads, y.data, y.count);
    case CallKind::kLinear:
      return spp_linear(linear(call.what), x.data, x.count, call.batch, call.threads, y.data, y.count);
    case CallKind::kPool:
      return spp_pool(static_cast<const EpilogueOp*>(call.what), call.batch, static_cast<int32_t>(call.height),
                      static_cast<int32_t>(call.width), call.threads, x.data, x.count, y.data, y.count);
    case CallKind::kNorm:
      return spp_norm(static_cast<const Norm*>(call.what), parts().data(), static_cast<int32_t>(call.num_parts),
                      static_cast<const uint8_t*>(call.with), call.batch, pixels, call.threads, y.data, y.count);
    case CallKind::kConcat:
      return spp_concat(parts().data(), static_cast<int32_t>(call.num_parts), call.batch, pixels, call.threads, y.data,
                        y.count);
    case CallKind::kAdd:
      return spp_add(x.data, x.count, residual.data, residual.count, call.threads, y.data, y.count);
    default:
      break;
  }
  throw BadArgument("There is no call of this kind.");
}

}  // namespace
}  // namespace spp

// Stops at the first call that fails.
SPP_EXPORT spp::Status spp_run_calls(const spp::ListedCall* calls, int32_t count, const spp::Memory* memories,
                                     int32_t num_memories) {
  spp::Status status = spp::Status::kOk;
  const spp::Status found = spp::guarded([&] {
    spp::check(count >= 0 && num_memories >= 0, "There must be 0 calls and memories or more.");
    for (int32_t i = 0; i < count && status == spp::Status::kOk; ++i)
      status = spp::run(calls[i], memories, num_memories);
  });
  return found == spp::Status::kOk ? status : found;
}
