// The part of onnxruntime's C API that the operators, and the example in examples/cpp, use.
//
// onnxruntime's wheel has no headers. Its C API is a table of functions that only ever grows at its end: a function
// keeps its slot, and its type, in every later version. So each function that is used is declared here with its slot
// in the table of version 16 (onnxruntime 1.16), and what lies between is left out. Where the slots come from:
// `ort_api_1_to_*` in onnxruntime/core/session/onnxruntime_c_api.cc, which asserts the last slot of each version
// (101 of version 1, 118 of 2, 124 of 3, 126 of 4, 149 of 5, 157 of 6, 161 of 7, 169 of 8, ..., 254 of 15).
//
// With onnxruntime's own headers at hand, include those instead: the names are the same.
#pragma once

#include <cstddef>
#include <cstdint>

constexpr uint32_t ORT_API_VERSION = 16;

struct OrtAllocator;
struct OrtCustomOpDomain;
struct OrtEnv;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtMemoryInfo;
struct OrtRunOptions;
struct OrtSession;
struct OrtSessionOptions;
struct OrtStatus;  // null is success
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;

enum OrtErrorCode { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9 };
enum OrtLoggingLevel { ORT_LOGGING_LEVEL_WARNING = 2 };
enum OrtAllocatorType { OrtArenaAllocator = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };
enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0,  // of an input: any
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
};
enum OrtCustomOpInputOutputCharacteristic {
  INPUT_OUTPUT_REQUIRED = 0,
  INPUT_OUTPUT_OPTIONAL = 1,
  INPUT_OUTPUT_VARIADIC = 2,
};

struct OrtCustomOp;

struct OrtApi {
  OrtStatus* (*CreateStatus)(OrtErrorCode, const char*);  // 0
  void* gap_1_[1];
  const char* (*GetErrorMessage)(const OrtStatus*);  // 2
  OrtStatus* (*CreateEnv)(OrtLoggingLevel, const char*, OrtEnv**);  // 3
  void* gap_4_[3];
  OrtStatus* (*CreateSession)(const OrtEnv*, const char* path, const OrtSessionOptions*, OrtSession**);  // 7
  void* gap_8_[1];
  OrtStatus* (*Run)(OrtSession*, const OrtRunOptions*, const char* const* input_names,
                    const OrtValue* const* inputs, size_t input_count, const char* const* output_names,
                    size_t output_count, OrtValue** outputs);  // 9
  OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**);     // 10
  void* gap_11_[13];
  OrtStatus* (*SetIntraOpNumThreads)(OrtSessionOptions*, int);  // 24
  void* gap_25_[1];
  OrtStatus* (*CreateCustomOpDomain)(const char*, OrtCustomOpDomain**);                 // 26
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain*, const OrtCustomOp*);             // 27
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions*, OrtCustomOpDomain*);              // 28
  OrtStatus* (*RegisterCustomOpsLibrary)(OrtSessionOptions*, const char* path, void** handle);  // 29
  void* gap_30_[6];
  OrtStatus* (*SessionGetInputName)(const OrtSession*, size_t, OrtAllocator*, char**);   // 36
  OrtStatus* (*SessionGetOutputName)(const OrtSession*, size_t, OrtAllocator*, char**);  // 37
  void* gap_38_[11];
  OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void* data, size_t bytes,
                                               const int64_t* shape, size_t dimensions,
                                               ONNXTensorElementDataType, OrtValue**);  // 49
  void* gap_50_[1];
  OrtStatus* (*GetTensorMutableData)(OrtValue*, void**);  // 51
  void* gap_52_[8];
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType*);  // 60
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, size_t*);                      // 61
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t);                  // 62
  void* gap_63_[1];
  OrtStatus* (*GetTensorShapeElementCount)(const OrtTensorTypeAndShapeInfo*, size_t*);  // 64
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);    // 65
  void* gap_66_[3];
  OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**);  // 69
  void* gap_70_[8];
  OrtStatus* (*GetAllocatorWithDefaultOptions)(OrtAllocator**);  // 78
  void* gap_79_[7];
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo*, const char*, int64_t*);  // 86
  void* gap_87_[1];
  OrtStatus* (*KernelContext_GetInputCount)(const OrtKernelContext*, size_t*);                 // 88
  void* gap_89_[1];
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext*, size_t, const OrtValue**);     // 90
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext*, size_t, const int64_t* shape, size_t dimensions,
                                        OrtValue**);  // 91
  void (*ReleaseEnv)(OrtEnv*);                          // 92
  void (*ReleaseStatus)(OrtStatus*);                    // 93
  void (*ReleaseMemoryInfo)(OrtMemoryInfo*);            // 94
  void (*ReleaseSession)(OrtSession*);                  // 95
  void (*ReleaseValue)(OrtValue*);                      // 96
  void* gap_97_[2];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);  // 99
  void (*ReleaseSessionOptions)(OrtSessionOptions*);                  // 100
  void* gap_101_[29];
  OrtStatus* (*AddSessionConfigEntry)(OrtSessionOptions*, const char* key, const char* value);  // 130
  void* gap_131_[31];
  OrtStatus* (*KernelInfoGetAttributeArray_float)(const OrtKernelInfo*, const char*, float*, size_t*);    // 162
  OrtStatus* (*KernelInfoGetAttributeArray_int64)(const OrtKernelInfo*, const char*, int64_t*, size_t*);  // 163
  void* gap_164_[66];
  OrtStatus* (*KernelInfo_GetInputCount)(const OrtKernelInfo*, size_t*);  // 230
  void* gap_231_[6];
  OrtStatus* (*HasSessionConfigEntry)(const OrtSessionOptions*, const char* key, int*);                  // 237
  OrtStatus* (*GetSessionConfigEntry)(const OrtSessionOptions*, const char* key, char* value, size_t*);  // 238
  void* gap_239_[10];
  OrtStatus* (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo*, size_t, int* is_constant,
                                                  const OrtValue**);  // 249
};

#define SPP_ORT_SLOT(name, slot) \
  static_assert(offsetof(OrtApi, name) == (slot) * sizeof(void*), #name " is in another slot")
SPP_ORT_SLOT(GetErrorMessage, 2);
SPP_ORT_SLOT(CreateSession, 7);
SPP_ORT_SLOT(CreateSessionOptions, 10);
SPP_ORT_SLOT(SetIntraOpNumThreads, 24);
SPP_ORT_SLOT(RegisterCustomOpsLibrary, 29);
SPP_ORT_SLOT(SessionGetInputName, 36);
SPP_ORT_SLOT(CreateTensorWithDataAsOrtValue, 49);
SPP_ORT_SLOT(GetTensorMutableData, 51);
SPP_ORT_SLOT(GetDimensions, 62);
SPP_ORT_SLOT(GetTensorTypeAndShape, 65);
SPP_ORT_SLOT(CreateCpuMemoryInfo, 69);
SPP_ORT_SLOT(GetAllocatorWithDefaultOptions, 78);
SPP_ORT_SLOT(KernelInfoGetAttribute_int64, 86);
SPP_ORT_SLOT(KernelContext_GetInputCount, 88);
SPP_ORT_SLOT(KernelContext_GetOutput, 91);
SPP_ORT_SLOT(ReleaseValue, 96);
SPP_ORT_SLOT(ReleaseSessionOptions, 100);
SPP_ORT_SLOT(AddSessionConfigEntry, 130);
SPP_ORT_SLOT(KernelInfoGetAttributeArray_int64, 163);
SPP_ORT_SLOT(KernelInfo_GetInputCount, 230);
SPP_ORT_SLOT(GetSessionConfigEntry, 238);
SPP_ORT_SLOT(KernelInfoGetConstantInput_tensor, 249);
#undef SPP_ORT_SLOT

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // null for a version that onnxruntime doesn't have yet
  const char* (*GetVersionString)();
};

// An operator: its schema, and the functions of its kernels. The members are those of version 16; onnxruntime reads
// no later ones of an operator that says so in `version`.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);  // not used: CreateKernelV2 is there
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  ONNXTensorElementDataType (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);  // not used: KernelComputeV2 is there
  void (*KernelDestroy)(void* kernel);
  OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  OrtMemType (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
};
