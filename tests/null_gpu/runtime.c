/* The CUDA runtime and cuBLAS: device memory is the host's, and work ends before it begins. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#undef cudaGetDeviceProperties
#define MEMORY (140ul << 30)
#define WRITTEN (256ul << 20) /* what is larger is not copied: the system gives pages as they are used */

/* ---- memory: what was allocated, and whether it is the device's */

static struct { char *start; size_t size; enum cudaMemoryType type; } blocks[1 << 16];
static size_t used;

static cudaError_t allocate(void **result, size_t size, enum cudaMemoryType type)
{
    size = (size + 4096) & ~4095ul;
    if (type == cudaMemoryTypeDevice && used + size > MEMORY) return cudaErrorMemoryAllocation;
    char *start = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return cudaErrorMemoryAllocation;
    int place = 0;
    while (blocks[place].start) place++;
    blocks[place].start = start, blocks[place].size = size, blocks[place].type = type;
    if (type == cudaMemoryTypeDevice) used += size;
    *result = start;
    return cudaSuccess;
}

static int find(const char *address)
{
    for (int place = 0; place < 1 << 16; place++)
        if (blocks[place].start && address >= blocks[place].start && address < blocks[place].start + blocks[place].size)
            return place;
    return -1;
}

cudaError_t cudaFree(void *address)
{
    int place = find(address);
    if (place < 0) return cudaSuccess;
    if (blocks[place].type == cudaMemoryTypeDevice) used -= blocks[place].size;
    munmap(blocks[place].start, blocks[place].size);
    blocks[place].start = 0;
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **result, size_t size) { return allocate(result, size, cudaMemoryTypeDevice); }
cudaError_t cudaHostAlloc(void **result, size_t size, unsigned flags) { return allocate(result, size, cudaMemoryTypeHost); }
cudaError_t cudaFreeHost(void *address) { return cudaFree(address); }

cudaError_t cudaMemGetInfo(size_t *left, size_t *all)
{
    *all = MEMORY, *left = MEMORY - used;
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address)
{
    int place = find(address);
    memset(found, 0, sizeof *found);
    found->type = place < 0 ? cudaMemoryTypeUnregistered : blocks[place].type;
    found->devicePointer = (void *)address;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    /* A number that a program waits for is 1, of whatever type: contestants agree, and nothing is divided by 0. */
    static const unsigned long one[9] = {[1] = 1, [2] = 0x3f80, [4] = 0x3f800000, [8] = 1};
    if (kind == cudaMemcpyDeviceToHost && size <= 8 && one[size]) from = &one[size];
    if (kind != cudaMemcpyDeviceToDevice || size <= WRITTEN) memcpy(to, from, size);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind)
{
    return cudaMemcpyAsync(to, from, size, kind, 0);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream)
{
    if (size <= WRITTEN) memset(to, value, size);
    return cudaSuccess;
}

/* ---- the device: an H200 by its numbers */

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device)
{
    memset(found, 0, sizeof *found);
    strcpy(found->name, "null GPU");
    found->major = 9, found->minor = 0, found->totalGlobalMem = MEMORY, found->multiProcessorCount = 132;
    found->warpSize = 32, found->maxThreadsPerBlock = 1024, found->maxThreadsPerMultiProcessor = 2048;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536, found->l2CacheSize = 60 << 20;
    found->sharedMemPerBlock = 48 << 10, found->sharedMemPerBlockOptin = 227 << 10;
    found->sharedMemPerMultiprocessor = 228 << 10, found->memoryBusWidth = 6144;
    found->maxGridSize[0] = 2147483647, found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024, found->maxThreadsDim[2] = 64;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    default: *value = 1;
    }
    return cudaSuccess;
}

/* ---- streams, events, graphs: numbers that nobody looks behind */

static long handles = 64;
static int captures;

static cudaError_t handle(void *result)
{
    *(long *)result = handles += 16;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) { return handle(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return handle(stream); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0, *greatest = -5; return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return handle(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return handle(event); }
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) { captures = 0; return handle(graph); }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) { return handle(made); }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) { *count = 1; return cudaSuccess; }

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    captures = 1;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status)
{
    *status = captures ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *number, cudaGraph_t *graph,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count)
{
    if (number) *number = 1;
    if (graph) *graph = 0;
    if (count) *count = 0;
    return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end)
{
    *milliseconds = 1 + rand() % 100 / 1e3f;
    return cudaSuccess;
}

/* ---- kernels */

cudaError_t __cudaLaunchKernel(void) { return cudaSuccess; }
cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **given, size_t shared, cudaStream_t stream) { return cudaSuccess; }
cudaError_t __cudaGetKernel(const void **kernel, const void *function) { *kernel = function; return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t error) { return "an error of the null GPU"; }
const char *cudaGetErrorName(cudaError_t error) { return "cudaError"; }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function)
{
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024, found->numRegs = 32, found->binaryVersion = found->ptxVersion = 90;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *function, int threads, size_t shared, unsigned flags)
{
    *blocks = 2;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared)
{
    *blocks = 2;
    return cudaSuccess;
}

/* ---- the driver's functions, which PyTorch asks the runtime for */

static int nothing(void) { return 0; }
static int is_active(int device, unsigned *flags, int *active) { *flags = 0, *active = 1; return 0; }

cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **found, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *how)
{
    *found = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)nothing : (void *)is_active;
    if (how) *how = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* ---- cuBLAS */

int cublasCreate_v2(void **result) { return handle(result); }
int cublasGetMathMode(void *library, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *library, int *mode) { *mode = 0; return 0; }
int cublasLtCreate(void **result) { return handle(result); }
int cublasLtMatmulDescCreate(void **result, int compute, int scale) { return handle(result); }
int cublasLtMatmulPreferenceCreate(void **result) { return handle(result); }
int cublasLtMatrixLayoutCreate(void **result, int type, unsigned long rows, unsigned long columns, long stride) { return handle(result); }

int cublasLtMatmulAlgoGetHeuristic(
    void *library, void *product, void *a, void *b, void *c, void *d, void *preference, int most, void *found, int *count)
{
    *count = 1;
    return 0;
}
