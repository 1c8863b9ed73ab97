// The operators `PlanePool`, of float32, and `Int8MaxPool`, of uint8. They read and write planes, (B, C, H, W).
#include "onnx_operator.h"
#include "onnx_planes.h"

namespace spp {
namespace {

template <Dtype dtype>
class PoolNode {
 public:
  PoolNode(const NodeInfo& info, int32_t threads)
      : pool_(PlaneOps(info.ints("post"), info.floats("alpha")), dtype, threads) {}

  void compute(const NodeCall& call) const {
    const Parameter x = call.input(0, dtype);
    pool_.run(x, call.output(pool_.out_shape(x.shape)));
  }

 private:
  PlanePool pool_;
};

}  // namespace

std::vector<Operator> pool_operators(int32_t threads) {
  constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kUint8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  return {make_operator<PoolNode<Dtype::kFloat32>>("PlanePool", kFloat, kFloat, 0, threads),
          make_operator<PoolNode<Dtype::kUint8>>("Int8MaxPool", kUint8, kUint8, 0, threads)};
}

}  // namespace spp
