// The CUDA runtime of a card that does nothing. It holds address space instead of memory, copies
// what is small, and counts what would have run.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "counting.h"

// ---- memory: address space that gets pages when somebody writes to it ----------------------------

#define GRAIN ((size_t)2 << 20)
#define RANGES 65536
#define SMALL (4 << 20)  // what is copied; larger tensors have no values

enum { NEITHER, PINNED, ON_CARD };

typedef struct {
    char *start;
    size_t size;
    int kind;
} Range;

static Range ranges[RANGES];
static int n_ranges;
static size_t held;  // bytes of the card
static pthread_mutex_t range_lock = PTHREAD_MUTEX_INITIALIZER;

static Range *range_of(const void *address) {
    const char *a = address;
    for (int i = n_ranges - 1; i >= 0; i--)
        if (ranges[i].start && a >= ranges[i].start && a < ranges[i].start + ranges[i].size)
            return &ranges[i];
    return NULL;
}

int kind_of_memory(const void *address) {
    Range *range = range_of(address);
    return range ? range->kind : NEITHER;
}

static size_t whole_grains(size_t size) {
    return (size + GRAIN - 1) / GRAIN * GRAIN;
}

static void *reserve(size_t size, int kind) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    size_t room = whole_grains(size);
    char *start = mmap(NULL, room + GRAIN, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    start = (char *)whole_grains((size_t)start);
    pthread_mutex_lock(&range_lock);
    int i = 0;
    while (i < n_ranges && ranges[i].start)
        i++;
    if (i == n_ranges)
        n_ranges++;
    ranges[i] = (Range){start, room, kind};
    if (kind == ON_CARD)
        held += room;
    pthread_mutex_unlock(&range_lock);
    return start;
}

static void release(void *start) {
    pthread_mutex_lock(&range_lock);
    Range *range = range_of(start);
    if (range) {
        if (range->kind == ON_CARD)
            held -= range->size;
        munmap(range->start, range->size);
        range->start = NULL;
    }
    pthread_mutex_unlock(&range_lock);
}

EXPORT cudaError_t cudaMalloc(void **address, size_t size) {
    if (held + size > CARD_BYTES) {
        count("cudaMalloc out of memory", size);
        return cudaErrorMemoryAllocation;
    }
    count("cudaMalloc", size);
    *address = reserve(size, ON_CARD);
    return cudaSuccess;
}

EXPORT cudaError_t cudaFree(void *address) {
    count("cudaFree", 0);
    release(address);
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
    count("cudaHostAlloc", size);
    *address = reserve(size, PINNED);
    return cudaSuccess;
}

EXPORT cudaError_t cudaFreeHost(void *address) {
    count("cudaFreeHost", 0);
    release(address);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *all_bytes) {
    *all_bytes = CARD_BYTES;
    *free_bytes = CARD_BYTES - held;
    return cudaSuccess;
}

EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *about, const void *p) {
    static const enum cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeHost,
                                                cudaMemoryTypeDevice};
    int kind = kind_of_memory(p);
    memset(about, 0, sizeof *about);
    about->type = types[kind];
    if (kind != NEITHER)
        about->devicePointer = (void *)p;
    if (kind == PINNED)
        about->hostPointer = (void *)p;
    return cudaSuccess;
}

// ---- CUDA graphs ---------------------------------------------------------------------------------

static int capturing;
static long nodes;  // of the graph that is captured

int is_capturing(void) {
    return capturing;
}

void count_on_card(const char *name, long bytes) {
    if (capturing)
        nodes++;
    count(name, bytes);
}

// What waits for the card ends a capture with an error, as a real driver would.
static cudaError_t not_in_capture(const char *what) {
    if (!capturing)
        return cudaSuccess;
    char text[200];
    snprintf(text, sizeof text, "forbidden in a capture: %s", what);
    count(text, 0);
    return cudaErrorStreamCaptureUnsupported;
}

static enum cudaStreamCaptureStatus capture_status(void) {
    return capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    *status = capture_status();
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **waits_for,
                                            const cudaGraphEdgeData **edges, size_t *n) {
    *status = capture_status();
    if (id)
        *id = 1;
    if (graph)
        *graph = (cudaGraph_t)8;
    if (waits_for)
        *waits_for = NULL;
    if (edges)
        *edges = NULL;
    if (n)
        *n = 0;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
    capturing = 1;
    nodes = 0;
    count("captures", 0);
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    capturing = 0;
    *graph = calloc(1, 64);
    *(long *)*graph = nodes;
    count("nodes of captures", nodes);
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph,
                                                 unsigned long long flags) {
    *exec = (cudaGraphExec_t)graph;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *list, size_t *n) {
    *n = 1;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
    count("graph launches", *(long *)exec);
    return cudaSuccess;
}

// ---- streams and events --------------------------------------------------------------------------

EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    *stream = malloc(64);
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int p) {
    return cudaStreamCreate(stream);
}

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    count("wait for a stream", 0);
    return not_in_capture("cudaStreamSynchronize");
}

EXPORT cudaError_t cudaDeviceSynchronize(void) {
    count("wait for the card", 0);
    return not_in_capture("cudaDeviceSynchronize");
}

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    function(data);
    return cudaSuccess;
}

static double milliseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = calloc(1, 64);
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) {
    return cudaEventCreateWithFlags(event, 0);
}

EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    *(double *)event = milliseconds();
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t s, unsigned flags) {
    return cudaEventRecord(event, s);
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    count("wait for an event", 0);
    return not_in_capture("cudaEventSynchronize");
}

EXPORT cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    *ms = *(double *)to - *(double *)from;
    return cudaSuccess;
}

// ---- copies --------------------------------------------------------------------------------------

// A number that nobody has written may be anything. A single byte is a question, such as whether the
// gradient is finite, and the answer is yes. One that is not finite becomes 1.
static void make_sense_of(void *number, size_t n) {
    if (n == 1)
        *(char *)number = 1;
    if (n == sizeof(float) && !isfinite(*(float *)number))
        *(float *)number = 1;
    if (n == sizeof(double) && !isfinite(*(double *)number))
        *(double *)number = 1;
}

static cudaError_t copy(void *to, const void *from, size_t n) {
    int to_kind = kind_of_memory(to);
    int from_kind = kind_of_memory(from);
    int here = to_kind == ON_CARD ? from_kind : to_kind;  // the end that may be on the host
    const char *name = "copy on the card";
    if (to_kind == ON_CARD && from_kind != ON_CARD)
        name = here == PINNED ? "copy to the card" : "copy to the card, not pinned";
    if (to_kind != ON_CARD && from_kind == ON_CARD)
        name = here == PINNED ? "copy from the card" : "copy from the card, not pinned";
    count_on_card(name, n);
    if (n <= SMALL)
        memcpy(to, from, n);
    if (to_kind != ON_CARD && from_kind == ON_CARD)
        make_sense_of(to, n);
    return here == NEITHER ? not_in_capture(name) : cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) {
    return copy(to, from, n);
}

EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind,
                                   cudaStream_t stream) {
    return copy(to, from, n);
}

EXPORT cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t pitch,
                                     size_t width, size_t height, enum cudaMemcpyKind kind,
                                     cudaStream_t stream) {
    count_on_card("copy of rows", width * height);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void *to, int value, size_t n, cudaStream_t stream) {
    count_on_card("memset", n);
    if (n <= SMALL)
        memset(to, value, n);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemset(void *to, int value, size_t n) {
    return cudaMemsetAsync(to, value, n, NULL);
}

// ---- kernels of PyTorch --------------------------------------------------------------------------

static __thread struct {
    dim3 grid;
    dim3 block;
    size_t shared;
    cudaStream_t stream;
} launching;

EXPORT void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[2];
    return handle;
}

EXPORT void __cudaRegisterFunction(void **handle, const char *kernel, char *there, const char *name,
                                   int limit, uint3 *a, uint3 *b, dim3 *c, dim3 *d, int *e) {
    name_kernel(kernel, name);
}

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                            struct CUstream_st *stream) {
    launching.grid = grid;
    launching.block = block;
    launching.shared = shared;
    launching.stream = stream;
    return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared,
                                              void *stream) {
    *grid = launching.grid;
    *block = launching.block;
    *shared = launching.shared;
    *(cudaStream_t *)stream = launching.stream;
    return cudaSuccess;
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments,
                                      size_t shared, cudaStream_t stream) {
    return launch(kernel);
}

EXPORT cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments,
                                    size_t shared, cudaStream_t stream) {
    return launch(kernel);
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *launch_config, const void *kernel,
                                       void **arguments) {
    return launch(kernel);
}

EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *about, const void *kernel) {
    memset(about, 0, sizeof *about);
    about->maxThreadsPerBlock = 1024;
    about->numRegs = 32;
    about->ptxVersion = 90;
    about->binaryVersion = 90;
    about->maxDynamicSharedSizeBytes = 48 << 10;
    return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *n, const void *kernel, int block, size_t shared, unsigned flags) {
    *n = 2;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char room[4096];
    *address = room;
    return cudaSuccess;
}

// ---- the card: what an H100 says of itself -------------------------------------------------------

int card_attribute(int attribute) {
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxBlockDimX: return 1024;
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: return 65535;
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 227 << 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 228 << 10;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrUnifiedAddressing: return 1;
    case cudaDevAttrCooperativeLaunch: return 1;
    default: return 0;
    }
}

EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = card_attribute(attribute);
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *about, int device) {
    memset(about, 0, sizeof *about);
    strcpy(about->name, "NVIDIA H100 80GB HBM3");
    about->major = 9;
    about->totalGlobalMem = CARD_BYTES;
    about->multiProcessorCount = 132;
    about->warpSize = 32;
    about->maxThreadsPerBlock = 1024;
    about->maxThreadsPerMultiProcessor = 2048;
    about->maxBlocksPerMultiProcessor = 32;
    about->regsPerBlock = 65536;
    about->regsPerMultiprocessor = 65536;
    about->sharedMemPerBlock = 48 << 10;
    about->sharedMemPerBlockOptin = 227 << 10;
    about->sharedMemPerMultiprocessor = 228 << 10;
    about->l2CacheSize = 50 << 20;
    about->memoryBusWidth = 5120;
    about->maxThreadsDim[0] = 1024;
    about->maxThreadsDim[1] = 1024;
    about->maxThreadsDim[2] = 64;
    about->maxGridSize[0] = 2147483647;
    about->maxGridSize[1] = 65535;
    about->maxGridSize[2] = 65535;
    about->unifiedAddressing = 1;
    about->concurrentKernels = 1;
    about->cooperativeLaunch = 1;
    about->asyncEngineCount = 3;
    about->textureAlignment = 512;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetDeviceCount(int *n) {
    *n = 1;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char *text, int n, int device) {
    strncpy(text, "0000:01:00.0", n);
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    *pool = (cudaMemPool_t)8;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDriverGetVersion(int *version) {
    *version = 13000;
    return cudaSuccess;
}

EXPORT cudaError_t cudaRuntimeGetVersion(int *version) {
    return cudaDriverGetVersion(version);
}

EXPORT const char *cudaGetErrorName(cudaError_t error) {
    return "an error of the card that does nothing";
}

EXPORT const char *cudaGetErrorString(cudaError_t error) {
    static char text[80];
    snprintf(text, sizeof text, "error %d of the card that does nothing", error);
    return text;
}
