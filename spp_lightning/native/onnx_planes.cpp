#include "onnx_planes.h"

#include <type_traits>
#include <utility>

#include "checks.h"
#include "int8_interface.h"

namespace spp {

PlaneOps::PlaneOps(const Shape& post, const std::vector<float>& alpha) {
  check_length("post", post.size(), alpha.size() * kPostNumbers);
  for (size_t i = 0; i < alpha.size(); ++i) ops_.push_back(epilogue_op(&post[i * kPostNumbers + 1], alpha[i]));
  check_epilogue(ops_.data(), static_cast<int32_t>(ops_.size()));
}

Shape PlaneOps::out_shape(const Shape& shape) const {
  check(shape.size() == 4, [&] {
    return "The input must be of shape (batch, channels, height, width), got " + shape_text(shape) + ".";
  });
  check(shape[2] <= kMostSize && shape[3] <= kMostSize, "Planes must be at most 2^24 wide and high.");
  PoolSize size{static_cast<int32_t>(shape[2]), static_cast<int32_t>(shape[3])};
  for (const EpilogueOp& op : ops_)
    if (op.kind != EpilogueKind::kLocalResponseNorm)
      size = check_pool(op, shape[0] * shape[1], size.height, size.width, 1);
  return {shape[0], shape[1], size.height, size.width};
}

PlanePool::PlanePool(PlaneOps pool, Dtype dtype, int32_t threads) : pool_(std::move(pool)), threads_(threads) {
  check(pool_.ops().size() == 1, "The attribute `post` must hold one pool.");
  const EpilogueKind kind = pool_.ops()[0].kind;
  check(kind == EpilogueKind::kMaxPool || (kind == EpilogueKind::kAveragePool && dtype == Dtype::kFloat32),
        [&] { return std::string("There is no such pool of ") + name_of(dtype) + "."; });
}

void PlanePool::run(const Parameter& x, void* out) const {
  const Shape shape = pool_.out_shape(x.shape);
  const auto compute = [&](auto* pool, auto* result) {
    using Number = std::remove_pointer_t<decltype(result)>;
    require(pool(&pool_.ops()[0], shape[0] * shape[1], static_cast<int32_t>(x.shape[2]),
                 static_cast<int32_t>(x.shape[3]), threads_, x.as<Number>(), count_of(x.shape), result,
                 count_of(shape)));
  };
  if (x.dtype == Dtype::kUint8) return compute(spp_int8_max_pool, static_cast<uint8_t*>(out));
  compute(spp_pool, static_cast<float*>(out));
}

}  // namespace spp
