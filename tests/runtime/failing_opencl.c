/* The machine's own OpenCL library, but one of its functions fails when FAIL says so: "NAME STATUS", or
 * "NAME STATUS FIRST" for that call and all after it. The variable is read at every call. With NO_IMAGES in the
 * environment its devices have no images, with ANOTHER_DRIVER their driver has another version. BALANCE names a file
 * that gets, when the process ends, how many objects of each kind were made and not released.
 *
 * Linked against "libreal.so", beside it a link to the real library, so whatever is not here is found there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void *any;

static int status_for(const char *name) {
    static int calls;
    static char counted[128];
    char wanted[64];
    int status = 0, first = 1;
    const char *order = getenv("FAIL");
    if (!order || sscanf(order, "%63s %d %d", wanted, &status, &first) < 2 || strcmp(wanted, name)) return 0;
    if (strcmp(counted, order)) {
        snprintf(counted, sizeof counted, "%s", order);
        calls = 0;
    }
    return ++calls >= first ? status : 0;
}

static void *real(const char *name) {
    void *library = dlopen("libreal.so", RTLD_NOW);
    void *function = library ? dlsym(library, name) : NULL;
    if (!function) abort();
    return function;
}

static struct {
    _Atomic long memory, programs, kernels, events;
} made;

__attribute__((destructor)) static void tell_balance(void) {
    const char *path = getenv("BALANCE");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (!file) return;
    fprintf(file, "memory %ld programs %ld kernels %ld events %ld\n", made.memory, made.programs, made.kernels, made.events);
    fclose(file);
}

#define GIVES_STATUS(name, parameters, arguments)                    \
    int32_t name parameters {                                        \
        int status = status_for(#name);                              \
        int32_t(*function) parameters = status ? NULL : real(#name); \
        return status ? status : function arguments;                 \
    }
#define GIVES_OBJECT(name, kind, parameters, arguments)          \
    any name parameters {                                        \
        int status = status_for(#name);                          \
        any(*function) parameters = status ? NULL : real(#name); \
        if (status && error) *error = status;                    \
        any object = status ? NULL : function arguments;         \
        if (object) kind;                                        \
        return object;                                           \
    }
#define TAKES_OBJECT(name, kind)                                                            \
    int32_t name(any object) {                                                              \
        int32_t status = object ? ((int32_t(*)(any))real(#name))(object) : /* none */ -30; \
        if (!status) kind;                                                                  \
        return status;                                                                      \
    }

int32_t clEnqueueNDRangeKernel(any q, any k, uint32_t n, const size_t *o, const size_t *g, const size_t *l, uint32_t w,
                               any *e, any *d) {
    int32_t status = status_for("clEnqueueNDRangeKernel");
    int32_t (*function)(any, any, uint32_t, const size_t *, const size_t *, const size_t *, uint32_t, any *, any *);
    function = real("clEnqueueNDRangeKernel");
    if (!status) status = function(q, k, n, o, g, l, w, e, d);
    if (!status && d) made.events++;
    return status;
}

GIVES_STATUS(clEnqueueReadBuffer, (any q, any m, uint32_t b, size_t o, size_t s, any p, uint32_t w, any *e, any *d),
             (q, m, b, o, s, p, w, e, d))
GIVES_STATUS(clEnqueueWriteBuffer, (any q, any m, uint32_t b, size_t o, size_t s, any p, uint32_t w, any *e, any *d),
             (q, m, b, o, s, p, w, e, d))
GIVES_STATUS(clFinish, (any q), (q))
GIVES_OBJECT(clCreateBuffer, made.memory++, (any c, uint64_t f, size_t s, any p, int32_t *error), (c, f, s, p, error))
GIVES_OBJECT(clCreateImage, made.memory++, (any c, uint64_t f, any g, any d, any p, int32_t *error),
             (c, f, g, d, p, error))
GIVES_OBJECT(clCreateContext, (void)0, (any p, uint32_t n, any d, any f, any u, int32_t *error), (p, n, d, f, u, error))
GIVES_OBJECT(clCreateProgramWithSource, made.programs++, (any c, uint32_t n, any t, any s, int32_t *error),
             (c, n, t, s, error))
GIVES_OBJECT(clCreateProgramWithBinary, made.programs++,
             (any c, uint32_t n, any d, any l, any b, any s, int32_t *error), (c, n, d, l, b, s, error))
GIVES_OBJECT(clCreateKernel, made.kernels++, (any p, const char *name, int32_t *error), (p, name, error))
TAKES_OBJECT(clReleaseMemObject, made.memory--)
TAKES_OBJECT(clReleaseProgram, made.programs--)
TAKES_OBJECT(clReleaseKernel, made.kernels--)
TAKES_OBJECT(clReleaseEvent, made.events--)

int32_t clGetDeviceInfo(any device, uint32_t what, size_t size, void *to, size_t *needed) {
    enum { IMAGE_SUPPORT = 0x1016, DRIVER_VERSION = 0x102D };
    int32_t (*function)(any, uint32_t, size_t, void *, size_t *) = real("clGetDeviceInfo");
    int32_t status = function(device, what, size, to, needed);
    if (what == IMAGE_SUPPORT && to && getenv("NO_IMAGES")) *(uint32_t *)to = 0;
    if (what == DRIVER_VERSION && to && getenv("ANOTHER_DRIVER")) *(char *)to = '?';
    return status;
}
