#include "onnx_node.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <memory>
#include <new>

namespace spp {
namespace {

template <typename Number>
std::vector<Number> numbers(const Api& api, const OrtKernelInfo* info, const char* name,
                            OrtStatus* (*get)(const OrtKernelInfo*, const char*, Number*, size_t*)) {
  size_t count = 0;
  api.ok(get(info, name, nullptr, &count));
  std::vector<Number> values(count);
  if (count > 0) api.ok(get(info, name, values.data(), &count));
  return values;
}

Dtype dtype_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return Dtype::kFloat32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return Dtype::kInt32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return Dtype::kUint8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return Dtype::kInt8;
    default: throw BadArgument("Tensors must be of float32, int32, uint8 or int8.");
  }
}

Parameter tensor_of(const Api& api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  api.ok(api->GetTensorTypeAndShape(value, &info));
  const auto release = api->ReleaseTensorTypeAndShapeInfo;
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> held(info, release);
  ONNXTensorElementDataType type;
  size_t dimensions = 0;
  api.ok(api->GetTensorElementType(info, &type));
  api.ok(api->GetDimensionsCount(info, &dimensions));
  Parameter tensor{nullptr, dtype_of(type), Shape(dimensions)};
  api.ok(api->GetDimensions(info, tensor.shape.data(), dimensions));
  void* data = nullptr;
  api.ok(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  return tensor;
}

}  // namespace

void Api::ok(OrtStatus* status) const {
  if (status == nullptr) return;
  const std::string message = api_->GetErrorMessage(status);
  api_->ReleaseStatus(status);
  throw BadArgument(message);
}

// Called where an exception is being handled.
OrtStatus* Api::status_of_exception() const {
  try {
    throw;
  } catch (const BadArgument& error) {
    return api_->CreateStatus(ORT_INVALID_ARGUMENT, error.what());
  } catch (const Unsupported& error) {
    return api_->CreateStatus(ORT_NOT_IMPLEMENTED, error.what());
  } catch (const std::bad_alloc&) {
    return api_->CreateStatus(ORT_FAIL, "There is no memory left for a convolution.");
  } catch (const std::exception& error) {
    return api_->CreateStatus(ORT_FAIL, error.what());
  }
}

std::vector<int64_t> NodeInfo::ints(const char* attribute) const {
  return numbers<int64_t>(api_, info_, attribute, api_->KernelInfoGetAttributeArray_int64);
}

std::vector<float> NodeInfo::floats(const char* attribute) const {
  return numbers<float>(api_, info_, attribute, api_->KernelInfoGetAttributeArray_float);
}

bool NodeInfo::flag(const char* attribute) const {
  int64_t value = 0;
  api_.ok(api_->KernelInfoGetAttribute_int64(info_, attribute, &value));
  check(value == 0 || value == 1, [&] { return std::string("The attribute `") + attribute + "` must be 0 or 1."; });
  return value == 1;
}

size_t NodeInfo::inputs() const {
  size_t count = 0;
  api_.ok(api_->KernelInfo_GetInputCount(info_, &count));
  return count;
}

std::vector<Parameter> NodeInfo::constants(size_t changing) const {
  const size_t count = inputs();
  check(count > changing, "The operator has too few inputs.");
  std::vector<Parameter> parameters;
  for (size_t i = 1; i < count - changing; ++i) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    api_.ok(api_->KernelInfoGetConstantInput_tensor(info_, i, &is_constant, &value));
    check(is_constant && value != nullptr, [&] {
      return "Input " + std::to_string(i) + " must be a constant: weights, columns and biases are initializers.";
    });
    parameters.push_back(tensor_of(api_, value));
  }
  return parameters;
}

Parameter NodeCall::input(size_t index, Dtype dtype) const {
  const OrtValue* value = nullptr;
  api_.ok(api_->KernelContext_GetInput(context_, index, &value));
  check(value != nullptr, "An input is missing.");
  const Parameter tensor = tensor_of(api_, value);
  check(tensor.dtype == dtype, [&] { return std::string("Images must be of ") + name_of(dtype) + "."; });
  return tensor;
}

void* NodeCall::output(const Shape& shape) const {
  OrtValue* value = nullptr;
  void* data = nullptr;
  api_.ok(api_->KernelContext_GetOutput(context_, 0, shape.data(), shape.size(), &value));
  api_.ok(api_->GetTensorMutableData(value, &data));
  return data;
}

int32_t default_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

}  // namespace spp
