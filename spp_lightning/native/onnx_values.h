// The attributes and tensors that a model's node holds, checked before a kernel reads them. Nothing in here knows
// onnxruntime.
#pragma once

#include <string>
#include <vector>

#include "interface.h"

namespace spp {

using Shape = std::vector<int64_t>;

constexpr size_t kGeometryNumbers = 11;  // channels, filters, kernel, stride, padding, dilation (two each), groups
constexpr size_t kPostNumbers = 10;      // layer, kind, kernel, stride, padding (two each), two flags
constexpr int64_t kMostThreads = 1024;
constexpr int64_t kMostSize = int64_t{1} << 24;         // of a kernel or window, so that no sum overflows
constexpr int64_t kMostNumbers = (int64_t{1} << 31) - 1;  // of an image

enum class Dtype { kFloat32, kInt32, kUint8, kInt8 };

const char* name_of(Dtype dtype);

// A tensor that somebody else owns.
struct Parameter {
  const void* data;
  Dtype dtype;
  Shape shape;

  template <typename Number>
  const Number* as() const {
    return static_cast<const Number*>(data);
  }
};

int64_t count_of(const Shape& shape);

// As in Python, such as "(1, 2)".
std::string shape_text(const Shape& shape);

// Throws what a function of the C interface reports.
void require(Status status);

// A number of an attribute, in [0, most].
int32_t number(const char* attribute, int64_t value, int64_t most);
void check_length(const char* attribute, size_t length, size_t expected);
void check_shape(const std::string& name, const Shape& shape, const Shape& expected);
void check_parameter(const std::string& name, const Parameter& tensor, Dtype dtype, size_t dimensions);

// Of kGeometryNumbers numbers.
Geometry geometry_of(const int64_t* numbers);
// Of kPostNumbers numbers, without the first one.
EpilogueOp epilogue_op(const int64_t* numbers, float alpha);

// A pass of a convolution over inputs of a shape, (B, C, H, W).
KernelConfig conv_config(const Geometry& g, const Shape& shape, int32_t threads);

}  // namespace spp
