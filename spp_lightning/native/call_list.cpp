#include "call_list.h"

#include "guard.h"
#include "interface.h"

namespace spp {
namespace {

Memory find(const Place& place, const Memory* memories, int32_t count) {
  if (place.memory < 0) return {nullptr, 0};
  check(place.memory < count, "A call must name one of the memories.");
  const Memory& memory = memories[place.memory];
  check(place.offset >= 0 && place.count >= 0 && place.count <= memory.count &&
            place.offset <= memory.count - place.count,
        "The tensors of a call must lie in their memories.");
  return {memory.data + place.offset, place.count};
}

// Every function checks the numbers of elements for itself.
Status run(const ListedCall& call, const Memory& x, const Memory& residual, const Memory& y) {
  const auto linear = [](const void* layer) { return static_cast<const Linear*>(layer); };
  switch (call.kind) {
    case CallKind::kLayer:
      return spp_forward(static_cast<const Plan*>(call.what), static_cast<const KernelConfig*>(call.with), x.data,
                         x.count, residual.data, residual.count, y.data, y.count);
    case CallKind::kChain:
      return spp_chain_forward(static_cast<const CheckedChain*>(call.what), x.data, x.count, residual.data,
                               residual.count, linear(call.with), y.data, y.count);
    case CallKind::kGate:
      return spp_gate(static_cast<const Gate*>(call.what), x.data, x.count, call.batch, call.pixels, call.threads,
                      y.data, y.count);
    case CallKind::kMeans:
      return spp_plane_means(x.data, x.count, call.batch, call.pixels, call.threads, y.data, y.count);
    case CallKind::kLinear:
      return spp_linear(linear(call.what), x.data, x.count, call.batch, call.threads, y.data, y.count);
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
    for (int32_t i = 0; i < count && status == spp::Status::kOk; ++i) {
      const auto at = [&](const spp::Place& place) { return spp::find(place, memories, num_memories); };
      status = spp::run(calls[i], at(calls[i].input), at(calls[i].residual), at(calls[i].output));
    }
  });
  return found == spp::Status::kOk ? status : found;
}
