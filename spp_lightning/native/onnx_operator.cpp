// The operators of the domain `spp_lightning`, for onnxruntime: `register_custom_ops_library` loads this library and
// calls RegisterCustomOps. docs/how-to/deploy.md says how a model is made that has them.
#include "onnx_operator.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

namespace spp {
namespace {

constexpr char kDomain[] = "spp_lightning", kThreadsKey[] = "spp_lightning.threads";

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
  check(end != text.data() && *end == '\0' && threads >= 1 && threads <= kMostThreads, [&] {
    return std::string("The session option `") + kThreadsKey + "` must be a number from 1 to 1024, got `" + text.data() + "`.";
  });
  return static_cast<int32_t>(threads);
}

// Sessions read the operators as long as they live: nothing is freed. There is a domain per number of threads.
OrtCustomOpDomain* domain_for(const Api& api, int32_t threads) {
  struct Registered {
    std::vector<Operator> operators;
    OrtCustomOpDomain* domain = nullptr;
  };
  static std::mutex mutex;
  static auto& made = *new std::map<std::pair<const OrtApi*, int32_t>, Registered>;
  const std::lock_guard lock(mutex);
  Registered& registered = made[{api.operator->(), threads}];
  if (registered.domain == nullptr) {
    auto& operators = registered.operators;
    operators = int8_operators(threads);
    for (const Operator& op : pool_operators(threads)) operators.push_back(op);
    operators.push_back(chain_operator(threads));
    OrtCustomOpDomain* domain = nullptr;
    api.ok(api->CreateCustomOpDomain(kDomain, &domain));
    for (const Operator& op : operators) api.ok(api->CustomOpDomain_Add(domain, &op));
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
