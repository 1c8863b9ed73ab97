#include "onnx_int8.h"

#include <utility>

#include "checks.h"

namespace spp {
namespace {

int32_t zero_point(int64_t value) { return number("zero_points", value, 255); }

float inverse_of(float scale) {
  check(scale > 0, [&] { return "The attribute `scales` must hold positive numbers, got " + std::to_string(scale) + "."; });
  return 1 / scale;
}

Int8Scales scales_of(const Int8Attributes& attributes, bool is_quantised) {
  check_length("scales", attributes.scales.size(), 3);
  check_length("zero_points", attributes.zero_points.size(), 3);
  check_length("clamp", attributes.clamp.size(), 2);
  const auto& scales = attributes.scales;
  const Shape& zeros = attributes.zero_points;
  Int8Scales made{};
  made.input_zero = zero_point(zeros[0]);
  made.has_residual = scales[1] != 0;
  made.residual_scale = scales[1];
  made.residual_zero = zero_point(zeros[1]);
  made.is_quantised = is_quantised;
  made.output_inverse = is_quantised ? inverse_of(scales[2]) : 1;
  made.output_zero = zero_point(zeros[2]);
  made.low = attributes.clamp[0], made.high = attributes.clamp[1];
  return made;
}

}  // namespace

Int8Convolution::Int8Convolution(const Int8Attributes& attributes, const std::vector<Parameter>& parameters,
                                 bool is_quantised, int32_t threads)
    : scales_(scales_of(attributes, is_quantised)), threads_(threads) {
  check_length("geometry", attributes.geometry.size(), kGeometryNumbers);
  geometry_ = geometry_of(attributes.geometry.data());
  const Geometry& g = geometry_;
  check(g.groups > 0, "A convolution has at least one group.");
  check(parameters.size() == 4,
        [&] { return "A layer needs 4 constant inputs, got " + std::to_string(parameters.size()) + "."; });
  const Parameter &weight = parameters[0], &columns = parameters[1], &scale = parameters[2], &bias = parameters[3];
  check_parameter("The weight", weight, Dtype::kInt8, 2);
  check_parameter("The columns", columns, Dtype::kInt32, 1);
  check_parameter("The weight's scales", scale, Dtype::kFloat32, 1);
  check_parameter("The bias", bias, Dtype::kFloat32, 1);
  check(columns.shape[0] <= kMostNumbers, "There are too many columns.");
  check_shape("The weight", weight.shape, {g.filters / g.groups, columns.shape[0]});
  std::vector<float> multiplier(scale.as<float>(), scale.as<float>() + scale.shape[0]);
  for (float& factor : multiplier) factor *= attributes.scales[0];
  Int8Plan* plan = nullptr;
  require(spp_int8_create(&g, columns.as<int32_t>(), static_cast<int32_t>(columns.shape[0]), weight.as<int8_t>(),
                          count_of(weight.shape), multiplier.data(), scale.shape[0], bias.as<float>(), bias.shape[0],
                          &scales_, &plan));
  plan_.reset(plan);
}

// A matrix has the features of images of one pixel.
KernelConfig Int8Convolution::config(const Shape& shape) const {
  return conv_config(geometry_, shape.size() == 2 ? Shape{shape[0], shape[1], 1, 1} : shape, threads_);
}

Shape Int8Convolution::out_shape(const Shape& shape) const {
  const KernelConfig sizes = config(shape);
  Shape out{sizes.batch, geometry_.filters, sizes.conv_height, sizes.conv_width};
  check(shape.size() == 4 || (out[2] == 1 && out[3] == 1), "Matrices are for layers that make one pixel of one.");
  out.resize(shape.size());
  return out;
}

void Int8Convolution::run(const Parameter& x, const Parameter* residual, void* out) const {
  const KernelConfig sizes = config(x.shape);
  const int64_t outputs = sizes.batch * geometry_.filters * sizes.conv_height * sizes.conv_width;
  require(spp_int8_forward(plan_.get(), &sizes, x.as<uint8_t>(), count_of(x.shape),
                           residual ? residual->as<uint8_t>() : nullptr, residual ? count_of(residual->shape) : 0, out,
                           outputs));
}

Int8Rounding::Int8Rounding(const std::vector<float>& scale, const Shape& zero_point, PlaneOps before, int32_t threads)
    : before_(std::move(before)), threads_(threads) {
  check_length("scales", scale.size(), 1);
  check_length("zero_points", zero_point.size(), 1);
  inverse_ = inverse_of(scale[0]);
  zero_ = spp::zero_point(zero_point[0]);
}

Shape Int8Rounding::out_shape(const Shape& shape) const {
  return before_.ops().empty() ? shape : before_.out_shape(shape);
}

void Int8Rounding::run(const Parameter& x, uint8_t* out) const {
  const int64_t count = count_of(x.shape);
  if (before_.ops().empty()) return require(spp_int8_quantize(inverse_, zero_, threads_, x.as<float>(), count, out, count));
  const Shape shape = before_.out_shape(x.shape);
  require(spp_int8_post(before_.ops().data(), static_cast<int32_t>(before_.ops().size()), shape[0] * shape[1],
                        static_cast<int32_t>(x.shape[2]), static_cast<int32_t>(x.shape[3]), inverse_, zero_, threads_,
                        x.as<float>(), count, out, count_of(shape)));
}

}  // namespace spp
