// The operator `ColumnChain` of the domain `spp_lightning`, for onnxruntime: `register_custom_ops_library` loads this
// library and calls RegisterCustomOps. docs/how-to/deploy.md says how a model is made that has it.
//
// Inputs: the images, (B, C, H, W); per layer weight, columns and bias, which are constants; with a linear layer its
// weight and bias, likewise; with a residual the tensor that the last layer adds. Output: float32.
#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdlib>
#include <map>
#include <new>

#include "checks.h"
#include "onnx_chain.h"
#include "onnxruntime_api.h"

namespace spp {
namespace {

constexpr char kDomain[] = "spp_lightning", kThreadsKey[] = "spp_lightning.threads";

struct Operator : OrtCustomOp {
  int32_t threads;  // 0: as many as OpenMP uses
};

// The table of functions; a status becomes an exception.
class Api {
 public:
  explicit Api(const OrtApi* api) : api_(api) {}
  const OrtApi* operator->() const { return api_; }

  void ok(OrtStatus* status) const {
    if (status == nullptr) return;
    const std::string message = api_->GetErrorMessage(status);
    api_->ReleaseStatus(status);
    throw BadArgument(message);
  }

  // Runs a function; what it throws becomes a status.
  template <typename Function>
  OrtStatus* guarded(const Function& run) const {
    try {
      run();
      return nullptr;
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

 private:
  const OrtApi* api_;
};

int32_t default_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

template <typename Number>
std::vector<Number> numbers(const Api& api, const OrtKernelInfo* info, const char* name,
                            OrtStatus* (*get)(const OrtKernelInfo*, const char*, Number*, size_t*)) {
  size_t count = 0;
  api.ok(get(info, name, nullptr, &count));
  std::vector<Number> values(count);
  if (count > 0) api.ok(get(info, name, values.data(), &count));
  return values;
}

bool flag(const Api& api, const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  api.ok(api->KernelInfoGetAttribute_int64(info, name, &value));
  check(value == 0 || value == 1, [&] { return std::string("The attribute `") + name + "` must be 0 or 1."; });
  return value == 1;
}

ChainAttributes attributes_of(const Api& api, const OrtKernelInfo* info) {
  const auto ints = [&](const char* name) {
    return numbers<int64_t>(api, info, name, api->KernelInfoGetAttributeArray_int64);
  };
  const auto floats = [&](const char* name) {
    return numbers<float>(api, info, name, api->KernelInfoGetAttributeArray_float);
  };
  return {ints("geometry"),   ints("activation"), floats("clamp"),           ints("post"),
          floats("alpha"), ints("configs"),    flag(api, info, "linear"), flag(api, info, "residual")};
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
  Parameter tensor{nullptr, type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, Shape(dimensions)};
  check(tensor.is_int32 || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "Tensors must be of float32 or int32.");
  api.ok(api->GetDimensions(info, tensor.shape.data(), dimensions));
  void* data = nullptr;
  api.ok(api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  tensor.data = data;
  return tensor;
}

// A node of a session.
class Node {
 public:
  Node(const Api& api, const OrtKernelInfo* info, int32_t threads) : api_(api) {
    const ChainAttributes attributes = attributes_of(api, info);
    size_t inputs = 0;
    api.ok(api->KernelInfo_GetInputCount(info, &inputs));
    const size_t changing = attributes.residual ? 2 : 1;
    check(inputs >= changing, "The operator has too few inputs.");
    std::vector<Parameter> parameters;
    for (size_t i = 1; i + (changing - 1) < inputs; ++i) {
      int is_constant = 0;
      const OrtValue* value = nullptr;
      api.ok(api->KernelInfoGetConstantInput_tensor(info, i, &is_constant, &value));
      check(is_constant && value != nullptr, [&] {
        return "Input " + std::to_string(i) + " must be a constant: weights, columns and biases are initializers.";
      });
      parameters.push_back(tensor_of(api, value));
    }
    residual_input_ = inputs - 1;
    if (attributes.linear) keep_linear(parameters);
    chain_ = std::make_unique<ColumnChain>(attributes, parameters, threads ? threads : default_threads());
  }

  void compute(OrtKernelContext* context) const {
    const Parameter x = input(context, 0);
    const auto prepared = chain_->prepared(x.shape);
    const void* residual = nullptr;
    if (chain_->adds_residual()) {
      const Parameter added = input(context, residual_input_);
      check(added.shape == prepared->residual, "The residual must be of the shape of the last convolution's output.");
      residual = added.data;
    }
    OrtValue* output = nullptr;
    void* data = nullptr;
    api_.ok(api_->KernelContext_GetOutput(context, 0, prepared->output.data(), prepared->output.size(), &output));
    api_.ok(api_->GetTensorMutableData(output, &data));
    chain_->run(*prepared, static_cast<const float*>(x.data), static_cast<const float*>(residual),
                static_cast<float*>(data));
  }

  const Api& api() const { return api_; }

 private:
  // A session may free what it passed on: the linear layer reads copies.
  void keep_linear(std::vector<Parameter>& parameters) {
    for (size_t i = 0; i < 2 && i < parameters.size(); ++i) {
      Parameter& tensor = parameters[parameters.size() - 1 - i];
      if (tensor.is_int32) continue;  // which the chain refuses
      size_t count = 1;
      for (int64_t size : tensor.shape) count *= size;
      const float* data = static_cast<const float*>(tensor.data);
      linear_[i].assign(data, data + count);
      tensor.data = linear_[i].data();
    }
  }

  Parameter input(OrtKernelContext* context, size_t index) const {
    const OrtValue* value = nullptr;
    api_.ok(api_->KernelContext_GetInput(context, index, &value));
    check(value != nullptr, "An input is missing.");
    const Parameter tensor = tensor_of(api_, value);
    check(!tensor.is_int32, "Images must be of float32.");
    return tensor;
  }

  Api api_;
  size_t residual_input_;
  std::vector<float> linear_[2];
  std::unique_ptr<const ColumnChain> chain_;
};

Operator make_operator(int32_t threads) {
  Operator op{};
  op.version = ORT_API_VERSION;
  op.threads = threads;
  op.GetName = [](const OrtCustomOp*) { return "ColumnChain"; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 2; };
  op.GetInputType = [](const OrtCustomOp*, size_t index) {
    return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
  };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 3; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi* functions, const OrtKernelInfo* info, void** kernel) {
    const Api api(functions);
    const int32_t threads = static_cast<const Operator*>(self)->threads;
    return api.guarded([&] { *kernel = new Node(api, info, threads); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const Node& node = *static_cast<const Node*>(kernel);
    return node.api().guarded([&] { node.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
  return op;
}

// Threads that a session's options ask for, or 0.
int32_t threads_of(const Api& api, const OrtSessionOptions* options) {
  int has = 0;
  api.ok(api->HasSessionConfigEntry(options, kThreadsKey, &has));
  if (!has) return 0;
  size_t size = 0;
  api.ok(api->GetSessionConfigEntry(options, kThreadsKey, nullptr, &size));
  std::vector<char> text(size + 1);
  api.ok(api->GetSessionConfigEntry(options, kThreadsKey, text.data(), &size));
  char* end = nullptr;
  const long threads = std::strtol(text.data(), &end, 10);
  check(end != text.data() && *end == '\0' && threads >= 1 && threads <= 1024, [&] {
    return std::string("The session option `") + kThreadsKey + "` must be a number from 1 to 1024, got `" + text.data() + "`.";
  });
  return static_cast<int32_t>(threads);
}

// Sessions read the operator as long as they live: nothing is freed. There is one per number of threads.
OrtCustomOpDomain* domain_for(const Api& api, int32_t threads) {
  struct Registered {
    Operator op;
    OrtCustomOpDomain* domain = nullptr;
  };
  static std::mutex mutex;
  static auto& made = *new std::map<std::pair<const OrtApi*, int32_t>, Registered>;
  const std::lock_guard lock(mutex);
  Registered& registered = made[{api.operator->(), threads}];
  if (registered.domain == nullptr) {
    registered.op = make_operator(threads);
    OrtCustomOpDomain* domain = nullptr;
    api.ok(api->CreateCustomOpDomain(kDomain, &domain));
    api.ok(api->CustomOpDomain_Add(domain, &registered.op));
    registered.domain = domain;
  }
  return registered.domain;
}

}  // namespace
}  // namespace spp

// The function that onnxruntime looks for in a library of operators.
SPP_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* functions = base->GetApi(ORT_API_VERSION);
  if (functions == nullptr)
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, "spp_lightning needs onnxruntime 1.16 or newer.");
  const spp::Api api(functions);
  return api.guarded(
      [&] { api.ok(api->AddCustomOpDomain(options, spp::domain_for(api, spp::threads_of(api, options)))); });
}
