// The operator `ColumnChain`.
//
// Inputs: the images, (B, C, H, W); per layer weight, columns and bias, which are constants; with a linear layer its
// weight and bias, likewise; with a residual the tensor that the last layer adds. Output: float32.
#include "onnx_chain.h"
#include "onnx_operator.h"

namespace spp {
namespace {

class ChainNode {
 public:
  ChainNode(const NodeInfo& info, int32_t threads) {
    const ChainAttributes attributes{info.ints("geometry"), info.ints("activation"), info.floats("clamp"),
                                     info.ints("post"),     info.floats("alpha"),    info.ints("configs"),
                                     info.flag("linear"),   info.flag("residual")};
    std::vector<Parameter> parameters = info.constants(attributes.residual ? 1 : 0);
    residual_input_ = info.inputs() - 1;
    if (attributes.linear) keep_linear(parameters);
    chain_ = std::make_unique<ColumnChain>(attributes, parameters, threads);
  }

  void compute(const NodeCall& call) const {
    const Parameter x = call.input(0, Dtype::kFloat32);
    const auto prepared = chain_->prepared(x.shape);
    const float* residual = nullptr;
    if (chain_->adds_residual()) {
      const Parameter added = call.input(residual_input_, Dtype::kFloat32);
      check(added.shape == prepared->residual, "The residual must be of the shape of the last convolution's output.");
      residual = added.as<float>();
    }
    chain_->run(*prepared, x.as<float>(), residual, static_cast<float*>(call.output(prepared->output)));
  }

 private:
  // A session may free what it passed on: the linear layer reads copies.
  void keep_linear(std::vector<Parameter>& parameters) {
    for (size_t i = 0; i < 2 && i < parameters.size(); ++i) {
      Parameter& tensor = parameters[parameters.size() - 1 - i];
      if (tensor.dtype != Dtype::kFloat32) continue;  // which the chain refuses
      size_t count = 1;
      for (int64_t size : tensor.shape) count *= size;
      linear_[i].assign(tensor.as<float>(), tensor.as<float>() + count);
      tensor.data = linear_[i].data();
    }
  }

  size_t residual_input_;
  std::vector<float> linear_[2];
  std::unique_ptr<const ColumnChain> chain_;
};

}  // namespace

Operator chain_operator(int32_t threads) {
  return make_operator<ChainNode>("ColumnChain", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                                  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 3, threads);
}

}  // namespace spp
