// The CUDA driver of a card that does nothing: what Triton calls, and the way to its functions.
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "counting.h"

// The headers give some functions the names of newer versions of them.
#undef cuGetProcAddress
#undef cuDevicePrimaryCtxReset

EXPORT CUresult cuDriverGetVersion(int *version) {
    *version = 13000;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGet(CUdevice *device, int number) {
    *device = number;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int *n) {
    *n = 1;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = card_attribute(attribute);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = (CUcontext)8;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return cuCtxGetCurrent(context);
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    if (flags)
        *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    *device = 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr p) {
    int kind = kind_of_memory((void *)p);
    if (!kind)
        return CUDA_ERROR_INVALID_VALUE;
    if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr *)value = p;
    else
        *(int *)value = kind == 1 ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
    return CUDA_SUCCESS;
}

// ---- kernels of Triton ---------------------------------------------------------------------------

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = (CUmodule)8;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoad(CUmodule *module, const char *file) {
    return cuModuleLoadData(module, NULL);
}

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    char text[3000];
    snprintf(text, sizeof text, "triton %s", name);
    *function = malloc(64);
    name_kernel(*function, text);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
    *value = 0;
    if (attribute == CU_FUNC_ATTRIBUTE_NUM_REGS)
        *value = 64;
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)
        *value = 1024;
    return CUDA_SUCCESS;
}

// A real driver refuses a grid that is empty or too large in its second or third side.
static CUresult launch_grid(CUfunction f, unsigned x, unsigned y, unsigned z) {
    if (x == 0 || y == 0 || z == 0 || y > 65535 || z > 65535) {
        count("refused grids", 0);
        return CUDA_ERROR_INVALID_VALUE;
    }
    return launch(f);
}

EXPORT CUresult cuLaunchKernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned bx,
                               unsigned by, unsigned bz, unsigned shared, CUstream stream,
                               void **arguments, void **extra) {
    return launch_grid(f, x, y, z);
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction f, void **arguments,
                                 void **extra) {
    return launch_grid(f, config->gridDimX, config->gridDimY, config->gridDimZ);
}

EXPORT CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned x, unsigned y, unsigned z,
                                          unsigned bx, unsigned by, unsigned bz, unsigned shared,
                                          CUstream stream, void **arguments) {
    return launch_grid(f, x, y, z);
}

EXPORT CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *config) {
    *n = 132;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int block,
                                                            size_t shared) {
    *n = 2;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "an error of the card that does nothing";
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **text) {
    return cuGetErrorString(error, text);
}

// ---- functions by name: ours, or one that does nothing -------------------------------------------

static int do_nothing() {
    return 0;
}

EXPORT CUresult cuGetProcAddress_v2(const char *name, void **function, int version,
                                    cuuint64_t flags, CUdriverProcAddressQueryResult *status) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function)
        *function = do_nothing;
    if (status)
        *status = CU_GET_PROC_ADDRESS_SUCCESS;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetProcAddress(const char *name, void **function, int version,
                                 cuuint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}

EXPORT int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                            unsigned long long flags, int *status) {
    if (status)
        *status = 0;
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
