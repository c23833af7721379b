/* NVIDIA's driver and as much of the CUDA runtime as TVM's calls, for a GPU that is not there: its memory is this
 * machine's, and its kernels run here or compute nothing. What a real one would refuse, this one does: kernels that are
 * not in the module, blocks and grids beyond its limits, and, while one thread captures a graph, whatever another may
 * not do then.
 *
 *   KERNELS=LIBRARY                      has the kernels for this machine: see kernels.hpp
 *   KERNELS=FOLDER                       has a library for each image, named by its hash
 *   FAKE_GPU="CAPABILITY DRIVER COUNT"   what it says of itself, by default "90 13000 1"
 *   FAIL="NAME STATUS [FIRST]"           that function fails so, from that call on; read at every call. A status that
 *                                        a GPU does not recover from stays, whatever is called next
 *   CALLS=FILE                           gets a line a launch: "kernel", "captured", or "graph" with its kernels
 *
 * To be loaded before the real runtime, which still gives the words for a status. */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define FAT_BINARY 0xBA55ED50u

typedef void runner(const unsigned *grid, const unsigned *block, void **arguments);

struct kernel {
    runner *run;
    int arguments;
};

struct launch {
    runner *run;
    unsigned grid[3], block[3];
    void **arguments;
};

/* Kept for as long as the process runs: what is made ready to be launched is the captured graph itself. */
struct graph {
    int count;
    struct launch *launches;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int lost;
static void *capturing;
static struct graph *captured;

static int about(int which, int otherwise) {
    int told[3] = {90, 13000, 1};
    const char *text = getenv("FAKE_GPU");
    if (text && sscanf(text, "%d %d %d", &told[0], &told[1], &told[2]) <= which) return otherwise;
    return told[which];
}

static void say(const char *what, int number) {
    const char *path = getenv("CALLS");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (!file) return;
    fprintf(file, "%s %d\n", what, number);
    fclose(file);
}

static int status_for(const char *name) {
    static int calls;
    static char counted[128];
    char wanted[64];
    int status = 0, first = 1;
    const char *order = getenv("FAIL");
    pthread_mutex_lock(&lock);
    if (!lost && order && sscanf(order, "%63s %d %d", wanted, &status, &first) >= 2 && !strcmp(wanted, name)) {
        if (strcmp(counted, order)) {
            snprintf(counted, sizeof counted, "%s", order);
            calls = 0;
        }
        if (++calls < first) status = 0;
        if (status >= 700 && status < 720 && status != 701) lost = status;
    } else {
        status = lost;
    }
    pthread_mutex_unlock(&lock);
    return status;
}

/* Calls that no thread may make while any captures; the capture of the graph that they meet is spoilt on a real GPU. */
static int unsafe(const char *name) {
    int status = status_for(name);
    return status ? status : capturing ? cudaErrorStreamCaptureUnsupported : 0;
}

#define TRY(status)                 \
    do {                            \
        int found = (status);       \
        if (found) return found;    \
    } while (0)

/* The driver. */

CUresult cuInit(unsigned flags) { return (void)flags, status_for(__func__); }
/* What NVIDIA's compiler asks a driver for; it does without. */
CUresult cuGetExportTable(const void **table, const CUuuid *which) {
    (void)which;
    return *table = NULL, CUDA_ERROR_NOT_FOUND;
}

CUresult cuDriverGetVersion(int *version) { return *version = about(1, 13000), 0; }
CUresult cuDeviceGetCount(int *count) { return *count = about(2, 1), 0; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, 0; }

CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    (void)device;
    snprintf(name, size, "NVIDIA Nothing");
    return 0;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    (void)device;
    *value = which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? about(0, 90) / 10
             : which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? about(0, 90) % 10
                                                                     : 0;
    return 0;
}

CUresult cuGetErrorName(CUresult status, const char **name) {
#define NAME(status) \
    case status: *name = #status; break
    switch (status) {
        NAME(CUDA_ERROR_INVALID_VALUE);
        NAME(CUDA_ERROR_OUT_OF_MEMORY);
        NAME(CUDA_ERROR_INVALID_IMAGE);
        NAME(CUDA_ERROR_NO_BINARY_FOR_GPU);
        NAME(CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
        NAME(CUDA_ERROR_NOT_FOUND);
        NAME(CUDA_ERROR_ILLEGAL_ADDRESS);
        NAME(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
        NAME(CUDA_ERROR_LAUNCH_FAILED);
        NAME(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
        default: *name = "CUDA_ERROR_UNKNOWN";
    }
    return 0;
}

CUresult cuGetErrorString(CUresult status, const char **words) { return cuGetErrorName(status, words); }

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    TRY(unsafe(__func__));
    *module = (CUmodule)image;
    return *(const uint32_t *)image == FAT_BINARY ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}

CUresult cuModuleUnload(CUmodule module) { return (void)module, status_for(__func__); }

/* The library with the kernels of an image. */
static void *kernels_of(const char *image, uint64_t size, const char *path) {
    struct stat told;
    char library[4096];
    uint64_t hash = 0xcbf29ce484222325u;
    if (stat(path, &told) || !S_ISDIR(told.st_mode)) return dlopen(path, RTLD_NOW);
    for (uint64_t i = 0; i < 16 + size; ++i) hash = (hash ^ (unsigned char)image[i]) * 0x100000001b3u;
    snprintf(library, sizeof library, "%s/%016llx.so", path, (unsigned long long)hash);
    return dlopen(library, RTLD_NOW);
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    TRY(status_for(__func__));
    const char *image = (const char *)module, *path = getenv("KERNELS");
    uint64_t size = *(const uint64_t *)(image + 8);
    if (!memmem(image, size, name, strlen(name) + 1)) return CUDA_ERROR_NOT_FOUND;
    struct kernel *kernel = calloc(1, sizeof *kernel);
    char symbol[256];
    if (path) {
        void *library = kernels_of(image, size, path);
        if (!library) return fprintf(stderr, "%s\n", dlerror()), CUDA_ERROR_NOT_FOUND;
        snprintf(symbol, sizeof symbol, "run_%s", name);
        kernel->run = (runner *)dlsym(library, symbol);
        snprintf(symbol, sizeof symbol, "count_%s", name);
        int (*count)(void) = (int (*)(void))dlsym(library, symbol);
        if (!kernel->run || !count) return CUDA_ERROR_NOT_FOUND;
        kernel->arguments = count();
    }
    *function = (CUfunction)kernel;
    return 0;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    return (void)function, (void)which, (void)value, status_for(__func__);
}

static void start(const struct launch *launch) {
    if (launch->run) launch->run(launch->grid, launch->block, launch->arguments);
}

/* Pointers to values, and the values behind them. */
static void **copied(void **arguments, int count) {
    void **copy = malloc((2 * count + 1) * sizeof *copy);
    for (int i = 0; copy && i < count; ++i) {
        copy[count + i] = *(void **)arguments[i];
        copy[i] = &copy[count + i];
    }
    return copy;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    (void)extra;
    TRY(status_for(__func__));
    unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
    if (!threads || threads > 1024 || config->blockDimZ > 64) return CUDA_ERROR_INVALID_VALUE;
    if (!config->gridDimX || !config->gridDimY || config->gridDimY > 65535 || !config->gridDimZ ||
        config->gridDimZ > 65535)
        return CUDA_ERROR_INVALID_VALUE;
    if (capturing && config->hStream != capturing) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    struct kernel *kernel = (struct kernel *)function;
    struct launch launch = {kernel->run,
                            {config->gridDimX, config->gridDimY, config->gridDimZ},
                            {config->blockDimX, config->blockDimY, config->blockDimZ},
                            arguments};
    say(capturing ? "captured" : "kernel", 1);
    if (!capturing) return start(&launch), 0;
    launch.arguments = copied(arguments, kernel->arguments);
    size_t size = (captured->count + 1) * sizeof launch;
    struct launch *more = realloc(captured->launches, size);
    if (!launch.arguments || !more) return CUDA_ERROR_OUT_OF_MEMORY;
    captured->launches = more;
    more[captured->count++] = launch;
    return 0;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dim, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *elements, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
    (void)map, (void)type, (void)rank, (void)address, (void)dim, (void)strides, (void)box, (void)elements;
    (void)interleave, (void)swizzle, (void)promotion, (void)fill;
    return CUDA_ERROR_NOT_SUPPORTED;
}

/* The runtime. */

cudaError_t cudaGetDeviceCount(int *count) { return *count = about(2, 1), status_for(__func__); }
cudaError_t cudaGetDevice(int *device) { return *device = 0, status_for(__func__); }
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    return cuDeviceGetAttribute(value, (CUdevice_attribute)which, device); /* they have the same numbers */
}
cudaError_t cudaSetDevice(int device) { return (void)device, status_for(__func__); }
cudaError_t cudaGetLastError(void) { return lost; }
cudaError_t cudaPeekAtLastError(void) { return lost; }
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) { return *left = *all = (size_t)1 << 34, unsafe(__func__); }

cudaError_t cudaMalloc(void **memory, size_t size) {
    TRY(unsafe(__func__));
    *memory = aligned_alloc(256, (size + 256) / 256 * 256);
    if (!*memory) return cudaErrorMemoryAllocation;
    memset(*memory, 0, size);
    return 0;
}

cudaError_t cudaFree(void *memory) {
    TRY(unsafe(__func__));
    free(memory);
    return 0;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)kind, (void)stream;
    TRY(unsafe(__func__));
    memcpy(to, from, size);
    return 0;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    TRY(status_for(__func__));
    *stream = malloc(1);
    return 0;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return (void)flags, cudaStreamCreate(stream);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    TRY(status_for(__func__));
    free(stream);
    return 0;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return (void)stream, unsafe(__func__); }

/* An event is the moment at which it was recorded: all before it has been done by then. */
cudaError_t cudaEventCreate(cudaEvent_t *event) {
    *event = calloc(1, sizeof(struct timespec));
    return unsafe(__func__);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return status_for(__func__);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    (void)stream;
    clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event);
    return status_for(__func__);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) { return (void)event, unsafe(__func__); }

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    struct timespec *from = (struct timespec *)start, *to = (struct timespec *)end;
    *ms = 1e3 * (to->tv_sec - from->tv_sec) + 1e-6 * (to->tv_nsec - from->tv_nsec);
    return status_for(__func__);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    (void)mode;
    TRY(unsafe(__func__));
    captured = calloc(1, sizeof *captured);
    if (!captured) return cudaErrorMemoryAllocation;
    capturing = stream;
    usleep(50000); /* time for other threads to do what they should not */
    return 0;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    (void)stream;
    capturing = NULL;
    TRY(status_for(__func__));
    *graph = (cudaGraph_t)captured;
    return 0;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *ready, cudaGraph_t graph, unsigned long long flags) {
    (void)flags;
    TRY(status_for(__func__));
    *ready = (cudaGraphExec_t)graph;
    return 0;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return (void)graph, status_for(__func__); }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t ready) { return (void)ready, status_for(__func__); }

cudaError_t cudaGraphLaunch(cudaGraphExec_t ready, cudaStream_t stream) {
    (void)stream;
    TRY(status_for(__func__));
    struct graph *graph = (struct graph *)ready;
    say("graph", graph->count);
    for (int i = 0; i < graph->count; ++i) start(&graph->launches[i]);
    return 0;
}
