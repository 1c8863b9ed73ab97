// What a kernel reads and writes of onnxruntime: its node's attributes and constants when it is made, inputs and
// output when it runs.
#pragma once

#include "checks.h"
#include "onnx_values.h"
#include "onnxruntime_api.h"

namespace spp {

// The table of functions; a status becomes an exception.
class Api {
 public:
  explicit Api(const OrtApi* api) : api_(api) {}
  const OrtApi* operator->() const { return api_; }

  void ok(OrtStatus* status) const;

  // Runs a function; what it throws becomes a status.
  template <typename Function>
  OrtStatus* guarded(const Function& run) const {
    try {
      run();
      return nullptr;
    } catch (...) {
      return status_of_exception();
    }
  }

 private:
  OrtStatus* status_of_exception() const;

  const OrtApi* api_;
};

// A node of a session that is being made.
class NodeInfo {
 public:
  NodeInfo(const Api& api, const OrtKernelInfo* info) : api_(api), info_(info) {}

  std::vector<int64_t> ints(const char* attribute) const;
  std::vector<float> floats(const char* attribute) const;
  bool flag(const char* attribute) const;

  size_t inputs() const;
  // The inputs from the second one on, but for the last `changing` ones. The session owns them, and may free them.
  std::vector<Parameter> constants(size_t changing) const;

 private:
  Api api_;
  const OrtKernelInfo* info_;
};

// A call of a node's kernel.
class NodeCall {
 public:
  NodeCall(const Api& api, OrtKernelContext* context) : api_(api), context_(context) {}

  Parameter input(size_t index, Dtype dtype) const;
  void* output(const Shape& shape) const;

 private:
  Api api_;
  OrtKernelContext* context_;
};

// Of OpenMP: all cores, or OMP_NUM_THREADS.
int32_t default_threads();

}  // namespace spp
