#include "onnx_values.h"

#include "checks.h"

namespace spp {
namespace {

constexpr int64_t kMostPixels = int64_t{1} << 30;  // along an axis

// Pixels of the convolution's output along an axis.
int32_t conv_size(const Geometry& g, int axis, int64_t size) {
  const int64_t reach = (int64_t{g.kernel[axis]} - 1) * g.dilation[axis] + 1;
  check(size > 0 && size <= kMostPixels, [&] { return "An image has " + std::to_string(size) + " pixels along an axis."; });
  const int64_t room = size + 2 * int64_t{g.padding[axis]} - reach;
  check(room >= 0 && room / g.stride[axis] < kMostPixels, [&] {
    return "An image of " + std::to_string(size) + " pixels along axis " + std::to_string(axis) +
           " doesn't fit the kernel, which reaches over " + std::to_string(reach) + ".";
  });
  return static_cast<int32_t>(room / g.stride[axis] + 1);
}

}  // namespace

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return "float32";
    case Dtype::kInt32: return "int32";
    case Dtype::kUint8: return "uint8";
    case Dtype::kInt8: return "int8";
  }
  return "";
}

int64_t count_of(const Shape& shape) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return count;
}

std::string shape_text(const Shape& shape) {
  std::string out;
  for (int64_t size : shape) out += (out.empty() ? "(" : ", ") + std::to_string(size);
  return out.empty() ? "()" : out + ")";
}

void require(Status status) {
  switch (status) {
    case Status::kOk: return;
    case Status::kBadArgument: throw BadArgument(spp_error());
    case Status::kUnsupported: throw Unsupported(spp_error());
    default: throw std::runtime_error(spp_error());
  }
}

int32_t number(const char* attribute, int64_t value, int64_t most) {
  check(value >= 0 && value <= most, [&] {
    return std::string("The attribute `") + attribute + "` must hold numbers from 0 to " + std::to_string(most) +
           ", got " + std::to_string(value) + ".";
  });
  return static_cast<int32_t>(value);
}

void check_length(const char* attribute, size_t length, size_t expected) {
  check(length == expected, [&] {
    return std::string("The attribute `") + attribute + "` must hold " + std::to_string(expected) + " numbers, got " +
           std::to_string(length) + ".";
  });
}

void check_shape(const std::string& name, const Shape& shape, const Shape& expected) {
  check(shape == expected,
        [&] { return name + " must be of shape " + shape_text(expected) + ", got " + shape_text(shape) + "."; });
}

void check_parameter(const std::string& name, const Parameter& tensor, Dtype dtype, size_t dimensions) {
  check(tensor.dtype == dtype && tensor.shape.size() == dimensions, [&] {
    return name + " must be of " + name_of(dtype) + " with " + std::to_string(dimensions) + " dimensions.";
  });
}

Geometry geometry_of(const int64_t* numbers) {
  int32_t n[kGeometryNumbers];
  for (size_t i = 0; i < kGeometryNumbers; ++i) n[i] = number("geometry", numbers[i], kMostSize);
  return {n[0], n[1], n[10], {n[2], n[3]}, {n[4], n[5]}, {n[6], n[7]}, {n[8], n[9]}};
}

EpilogueOp epilogue_op(const int64_t* numbers, float alpha) {
  int32_t n[kPostNumbers - 1];
  for (size_t i = 0; i < kPostNumbers - 1; ++i) n[i] = number("post", numbers[i], kMostSize);
  return {static_cast<EpilogueKind>(n[0]), {n[1], n[2]}, {n[3], n[4]}, {n[5], n[6]}, n[7], n[8], alpha};
}

KernelConfig conv_config(const Geometry& g, const Shape& shape, int32_t threads) {
  check(shape.size() == 4 && shape[1] == g.channels, [&] {
    return "The input must be of shape (batch, " + std::to_string(g.channels) + ", height, width), got " +
           shape_text(shape) + ".";
  });
  check(shape[0] <= kMostNumbers, "The batch is too large; split it.");
  const int32_t sizes[2] = {conv_size(g, 0, shape[2]), conv_size(g, 1, shape[3])};
  check(int64_t{g.filters} * sizes[0] <= kMostNumbers / sizes[1], "An image must have fewer than 2³¹ numbers; split it.");
  return {shape[0], static_cast<int32_t>(shape[2]), static_cast<int32_t>(shape[3]), sizes[0], sizes[1], threads,
          Kernel::kPixelVectorised, 0};
}

}  // namespace spp
