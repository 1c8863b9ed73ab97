// An operator of the domain `spp_lightning`, made of the class that computes its nodes.
#pragma once

#include "onnx_node.h"

namespace spp {

struct Operator : OrtCustomOp {
  const char* name;
  ONNXTensorElementDataType input, output;  // the first input
  int least_others;                         // further inputs that there are at least; 0: there are none
  int32_t threads;
};

// A node of a session, and the table of the session's onnxruntime.
template <typename Node>
struct Held {
  Api api;
  Node node;
};

// What an operator says of its inputs and its output.
inline void describe(Operator& op) {
  op.version = ORT_API_VERSION;
  op.GetName = [](const OrtCustomOp* self) { return static_cast<const Operator*>(self)->name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const OrtCustomOp* self) -> size_t {
    return static_cast<const Operator*>(self)->least_others > 0 ? 2 : 1;
  };
  op.GetInputType = [](const OrtCustomOp* self, size_t index) {
    return index == 0 ? static_cast<const Operator*>(self)->input : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp* self) { return static_cast<const Operator*>(self)->least_others; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp* self, size_t) { return static_cast<const Operator*>(self)->output; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
}

// `Node` is made of a NodeInfo and a number of threads, and has `compute(const NodeCall&) const`. `threads` is 0 for as
// many as OpenMP uses.
template <typename Node>
Operator make_operator(const char* name, ONNXTensorElementDataType input, ONNXTensorElementDataType output,
                       int least_others, int32_t threads) {
  Operator op{};
  op.name = name;
  op.input = input, op.output = output;
  op.least_others = least_others;
  op.threads = threads;
  describe(op);
  op.CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi* functions, const OrtKernelInfo* info, void** kernel) {
    const Api api(functions);
    const int32_t wanted = static_cast<const Operator*>(self)->threads;
    return api.guarded([&] {
      *kernel = new Held<Node>{api, Node(NodeInfo(api, info), wanted ? wanted : default_threads())};
    });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const auto& held = *static_cast<const Held<Node>*>(kernel);
    return held.api.guarded([&] { held.node.compute(NodeCall(held.api, context)); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Held<Node>*>(kernel); };
  return op;
}

// All that there are.
Operator chain_operator(int32_t threads);
std::vector<Operator> int8_operators(int32_t threads);
std::vector<Operator> pool_operators(int32_t threads);

}  // namespace spp
