// The operators of int8 layers.
//
// `Int8Convolution` and `Int8ConvolutionToFloat` read images (B, C, H, W), or matrices (B, C), of uint8; weight, columns,
// scales of the filters' weights and bias, which are constants; with a residual the tensor of uint8 that is added.
// `Int8Quantize` reads float32. All write uint8, but for `Int8ConvolutionToFloat`.
#include "onnx_int8.h"
#include "onnx_operator.h"

namespace spp {
namespace {

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kUint8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr size_t kResidualInput = 5;

template <bool is_quantised>
class ConvolutionNode {
 public:
  ConvolutionNode(const NodeInfo& info, int32_t threads)
      : layer_({info.ints("geometry"), info.floats("scales"), info.ints("zero_points"), info.floats("clamp")},
               info.constants(info.inputs() > kResidualInput), is_quantised, threads) {
    check((info.inputs() > kResidualInput) == layer_.adds_residual(),
          "There must be a residual if and only if the attribute `scales` has a scale for it.");
  }

  void compute(const NodeCall& call) const {
    const Parameter x = call.input(0, Dtype::kUint8);
    const Shape shape = layer_.out_shape(x.shape);
    void* out = call.output(shape);
    if (!layer_.adds_residual()) return layer_.run(x, nullptr, out);
    const Parameter residual = call.input(kResidualInput, Dtype::kUint8);
    check_shape("The residual", residual.shape, shape);
    layer_.run(x, &residual, out);
  }

 private:
  Int8Convolution layer_;
};

class QuantizeNode {
 public:
  QuantizeNode(const NodeInfo& info, int32_t threads)
      : layer_(info.floats("scales"), info.ints("zero_points"), PlaneOps(info.ints("post"), info.floats("alpha")),
               threads) {}

  void compute(const NodeCall& call) const {
    const Parameter x = call.input(0, Dtype::kFloat32);
    layer_.run(x, static_cast<uint8_t*>(call.output(layer_.out_shape(x.shape))));
  }

 private:
  Int8Rounding layer_;
};

}  // namespace

std::vector<Operator> int8_operators(int32_t threads) {
  return {make_operator<ConvolutionNode<true>>("Int8Convolution", kUint8, kUint8, 4, threads),
          make_operator<ConvolutionNode<false>>("Int8ConvolutionToFloat", kUint8, kFloat, 4, threads),
          make_operator<QuantizeNode>("Int8Quantize", kFloat, kUint8, 0, threads)};
}

}  // namespace spp
