// The part of ONNX Runtime's C interface that the ops need, declared by hand: the runtime's wheels ship no headers.
//
// OrtApi is an append-only table of function pointers, so an entry's index never changes. OrtCustomOp is append-only
// too; the runtime reads a field only if `version` says that the op was built against a version that has it.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _WIN32
#define ORT_CALL __stdcall
#define ORT_EXPORT extern "C" __declspec(dllexport)
#else
#define ORT_CALL
#define ORT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

extern "C" {

struct OrtApi;
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;

struct OrtApiBase {
  const OrtApi*(ORT_CALL* GetApi)(uint32_t version);  // null when the runtime is older than `version`
  const char*(ORT_CALL* GetVersionString)();
};

struct OrtCustomOp {
  uint32_t version;
  void*(ORT_CALL* CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char*(ORT_CALL* GetName)(const OrtCustomOp*);
  const char*(ORT_CALL* GetExecutionProviderType)(const OrtCustomOp*);  // null result: the CPU provider
  int(ORT_CALL* GetInputType)(const OrtCustomOp*, size_t);
  size_t(ORT_CALL* GetInputTypeCount)(const OrtCustomOp*);
  int(ORT_CALL* GetOutputType)(const OrtCustomOp*, size_t);
  size_t(ORT_CALL* GetOutputTypeCount)(const OrtCustomOp*);
  void(ORT_CALL* KernelCompute)(void*, OrtKernelContext*);
  void(ORT_CALL* KernelDestroy)(void*);
  int(ORT_CALL* GetInputCharacteristic)(const OrtCustomOp*, size_t);  // 0 required, 1 optional, 2 variadic
  int(ORT_CALL* GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  int(ORT_CALL* GetInputMemoryType)(const OrtCustomOp*, size_t);  // 0: the provider's default
  int(ORT_CALL* GetVariadicInputMinArity)(const OrtCustomOp*);
  int(ORT_CALL* GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int(ORT_CALL* GetVariadicOutputMinArity)(const OrtCustomOp*);
  int(ORT_CALL* GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus*(ORT_CALL* CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus*(ORT_CALL* KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus*(ORT_CALL* InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);  // may be null
  int(ORT_CALL* GetStartVersion)(const OrtCustomOp*);
  int(ORT_CALL* GetEndVersion)(const OrtCustomOp*);
  size_t(ORT_CALL* GetMayInplace)(int** inputs, int** outputs);  // may be null
  void(ORT_CALL* ReleaseMayInplace)(int* inputs, int* outputs);
  size_t(ORT_CALL* GetAliasMap)(int** inputs, int** outputs);  // leave null: it corrupts a second reader
  void(ORT_CALL* ReleaseAliasMap)(int* inputs, int* outputs);
};

}  // extern "C"

static_assert(sizeof(void*) != 8 || sizeof(OrtCustomOp) == 26 * 8, "OrtCustomOp must be a uint32 and 25 pointers");

namespace ort {

constexpr uint32_t kApiVersion = 18;  // ONNX Runtime 1.18
constexpr int kFail = 1;              // OrtErrorCode
constexpr int kInvalidArgument = 2;

enum ElementType : int { kFloat32 = 1, kUint8 = 2, kInt8 = 3, kInt16 = 5, kInt32 = 6, kFloat16 = 10 };  // ONNXTensorElementDataType

// X(index in OrtApi, name, result, parameters, arguments)
#define ORT_API_FUNCTIONS(X)                                                                                         \
  X(0, CreateStatus, OrtStatus*, (int code, const char* message), (code, message))                                   \
  X(26, CreateCustomOpDomain, OrtStatus*, (const char* name, OrtCustomOpDomain** out), (name, out))                  \
  X(27, CustomOpDomain_Add, OrtStatus*, (OrtCustomOpDomain* domain, const OrtCustomOp* op), (domain, op))            \
  X(28, AddCustomOpDomain, OrtStatus*, (OrtSessionOptions* options, OrtCustomOpDomain* domain), (options, domain))   \
  X(51, GetTensorMutableData, OrtStatus*, (OrtValue* value, void** out), (value, out))                               \
  X(60, GetTensorElementType, OrtStatus*, (const OrtTensorTypeAndShapeInfo* info, int* out), (info, out))            \
  X(61, GetDimensionsCount, OrtStatus*, (const OrtTensorTypeAndShapeInfo* info, size_t* out), (info, out))           \
  X(62, GetDimensions, OrtStatus*, (const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t count),             \
    (info, dims, count))                                                                                             \
  X(65, GetTensorTypeAndShape, OrtStatus*, (const OrtValue* value, OrtTensorTypeAndShapeInfo** out), (value, out))   \
  X(85, KernelInfoGetAttribute_float, OrtStatus*, (const OrtKernelInfo* info, const char* name, float* out),         \
    (info, name, out))                                                                                               \
  X(86, KernelInfoGetAttribute_int64, OrtStatus*, (const OrtKernelInfo* info, const char* name, int64_t* out),       \
    (info, name, out))                                                                                               \
  X(90, KernelContext_GetInput, OrtStatus*, (const OrtKernelContext* context, size_t index, const OrtValue** out),   \
    (context, index, out))                                                                                           \
  X(91, KernelContext_GetOutput, OrtStatus*,                                                                         \
    (OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank, OrtValue** out),                     \
    (context, index, dims, rank, out))                                                                               \
  X(93, ReleaseStatus, void, (OrtStatus* status), (status))                                                          \
  X(99, ReleaseTensorTypeAndShapeInfo, void, (OrtTensorTypeAndShapeInfo* info), (info))                              \
  X(249, KernelInfoGetConstantInput_tensor, OrtStatus*,                                                              \
    (const OrtKernelInfo* info, size_t index, int* is_constant, const OrtValue** out),                               \
    (info, index, is_constant, out))                                                                                 \
  X(268, ShapeInferContext_GetInputTypeShape, OrtStatus*,                                                            \
    (const OrtShapeInferContext* context, size_t index, OrtTensorTypeAndShapeInfo** out), (context, index, out))     \
  X(270, ShapeInferContext_SetOutputTypeShape, OrtStatus*,                                                           \
    (const OrtShapeInferContext* context, size_t index, const OrtTensorTypeAndShapeInfo* info),                      \
    (context, index, info))                                                                                          \
  X(274, KernelContext_ParallelFor, OrtStatus*,                                                                      \
    (const OrtKernelContext* context, void (*body)(void*, size_t), size_t total, size_t num_batch, void* user_data), \
    (context, body, total, num_batch, user_data))

// The functions above as methods; `table` is what OrtApiBase::GetApi returned.
class Api {
 public:
  void attach(const OrtApi* table) { slots_ = reinterpret_cast<void* const*>(table); }

#define ORT_API_METHOD(index, name, result, parameters, arguments) \
  result name parameters const {                                   \
    using Function = result(ORT_CALL*) parameters;                 \
    return reinterpret_cast<Function>(slots_[index]) arguments;    \
  }
  ORT_API_FUNCTIONS(ORT_API_METHOD)
#undef ORT_API_METHOD

 private:
  void* const* slots_ = nullptr;
};

}  // namespace ort
