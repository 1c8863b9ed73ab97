// Runs a compact network in onnxruntime, without Python:
//
//   g++ -std=c++17 -O2 -I spp_lightning/native examples/cpp/run_onnx.cpp -o run_onnx -ldl
//   ./run_onnx libonnxruntime.so kernels.so net.onnx 2 input.bin output.bin 1 3 32 32
//
// The arguments: onnxruntime's library, which its wheel and its releases have; this package's library; the model;
// threads; a file with the input's numbers, float32; the file to write; the input's shape. It prints the median time
// of a run in milliseconds.
//
// A program that links to onnxruntime includes <onnxruntime_c_api.h> in place of onnxruntime_api.h, and calls
// OrtGetApiBase() itself. The rest stays as it is.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime_api.h"

namespace {

const OrtApi* api = nullptr;

void ok(OrtStatus* status) {
  if (status != nullptr) throw std::runtime_error(api->GetErrorMessage(status));
}

const OrtApi* load_onnxruntime(const char* path) {
  void* library = dlopen(path, RTLD_NOW);
  if (library == nullptr) throw std::runtime_error(dlerror());
  const auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"));
  if (base == nullptr) throw std::runtime_error("This is not onnxruntime's library.");
  const OrtApi* found = base()->GetApi(ORT_API_VERSION);
  if (found == nullptr) throw std::runtime_error("onnxruntime is older than 1.16.");
  return found;
}

std::vector<float> read_floats(const char* path, size_t count) {
  std::vector<float> numbers(count);
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(numbers.data()), static_cast<std::streamsize>(count * sizeof(float)));
  if (!file || file.peek() != EOF) throw std::runtime_error(std::string(path) + " isn't of the input's size.");
  return numbers;
}

OrtSession* make_session(const OrtEnv* env, const char* operators, const char* model, const char* threads) {
  OrtSessionOptions* options = nullptr;
  ok(api->CreateSessionOptions(&options));
  // Before the library is registered, which reads it. onnxruntime's own operators are few: one thread is enough.
  ok(api->AddSessionConfigEntry(options, "spp_lightning.threads", threads));
  ok(api->SetIntraOpNumThreads(options, 1));
  void* handle = nullptr;
  ok(api->RegisterCustomOpsLibrary(options, operators, &handle));
  OrtSession* session = nullptr;
  ok(api->CreateSession(env, model, options, &session));
  api->ReleaseSessionOptions(options);
  return session;
}

struct Names {
  char *input, *output;
};

Names names_of(const OrtSession* session) {
  OrtAllocator* allocator = nullptr;
  ok(api->GetAllocatorWithDefaultOptions(&allocator));
  Names names{};
  ok(api->SessionGetInputName(session, 0, allocator, &names.input));
  ok(api->SessionGetOutputName(session, 0, allocator, &names.output));
  return names;
}

OrtValue* run(OrtSession* session, const Names& names, const OrtValue* input) {
  OrtValue* output = nullptr;
  ok(api->Run(session, nullptr, &names.input, &input, 1, &names.output, 1, &output));
  return output;
}

double median_ms(OrtSession* session, const Names& names, const OrtValue* input) {
  std::vector<double> times;
  for (int round = 0; round < 30; ++round) {
    const auto start = std::chrono::steady_clock::now();
    api->ReleaseValue(run(session, names, input));
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

void write_output(const char* path, OrtValue* output) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  size_t count = 0;
  void* data = nullptr;
  ok(api->GetTensorTypeAndShape(output, &info));
  ok(api->GetTensorShapeElementCount(info, &count));
  ok(api->GetTensorMutableData(output, &data));
  api->ReleaseTensorTypeAndShapeInfo(info);
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(data), static_cast<std::streamsize>(count * sizeof(float)));
}

void run_all(char** arguments, int count) {
  api = load_onnxruntime(arguments[1]);
  std::vector<int64_t> shape;
  size_t numbers = 1;
  for (int i = 7; i < count; ++i) numbers *= shape.emplace_back(std::atoll(arguments[i]));
  std::vector<float> input = read_floats(arguments[5], numbers);
  OrtEnv* env = nullptr;
  OrtMemoryInfo* memory = nullptr;
  OrtValue* value = nullptr;
  ok(api->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "run_onnx", &env));
  OrtSession* session = make_session(env, arguments[2], arguments[3], arguments[4]);
  ok(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  ok(api->CreateTensorWithDataAsOrtValue(memory, input.data(), numbers * sizeof(float), shape.data(), shape.size(),
                                         ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &value));
  const Names names = names_of(session);
  OrtValue* output = run(session, names, value);
  write_output(arguments[6], output);
  std::printf("%.3f\n", median_ms(session, names, value));
  api->ReleaseValue(output);
  api->ReleaseValue(value);
  api->ReleaseMemoryInfo(memory);
  api->ReleaseSession(session);
  api->ReleaseEnv(env);
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 8) {
    std::fprintf(stderr, "run_onnx ONNXRUNTIME KERNELS MODEL THREADS INPUT OUTPUT SIZE...\n");
    return 2;
  }
  try {
    run_all(arguments, count);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
