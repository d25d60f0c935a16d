// Functions whose arguments do not matter, so no header is included here. Those of the first list
// succeed and do nothing. Those of the second are products: they are counted like kernels.
#include "counting.h"

#define SUCCEEDS(name) \
    EXPORT int name() { return 0; }

#define PRODUCT(name)                        \
    EXPORT int name() {                      \
        count_on_card("kernel " #name, 0);   \
        return 0;                            \
    }

SUCCEEDS(__cudaInitModule)
SUCCEEDS(__cudaRegisterFatBinaryEnd)
SUCCEEDS(__cudaRegisterVar)
SUCCEEDS(__cudaUnregisterFatBinary)
SUCCEEDS(cudaDeviceCanAccessPeer)
SUCCEEDS(cudaDeviceEnablePeerAccess)
SUCCEEDS(cudaEventQuery)
SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaGetLastError)
SUCCEEDS(cudaGraphDestroy)
SUCCEEDS(cudaGraphExecDestroy)
SUCCEEDS(cudaGraphNodeGetDependencies)
SUCCEEDS(cudaHostRegister)
SUCCEEDS(cudaHostUnregister)
SUCCEEDS(cudaMemcpyToSymbol)
SUCCEEDS(cudaPeekAtLastError)
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)
SUCCEEDS(cudaSetDevice)
SUCCEEDS(cudaStreamDestroy)
SUCCEEDS(cudaStreamQuery)
SUCCEEDS(cudaStreamWaitEvent)
SUCCEEDS(cudaThreadExchangeStreamCaptureMode)

SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuInit)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuTensorMapEncodeTiled)

SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetStream_v2)
SUCCEEDS(cublasSetWorkspace_v2)

PRODUCT(cublasDdot_v2)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasLtMatmul)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemv_v2)

// 1: it could not be initialised.
EXPORT int cudnnCreate() { return 1001; }
