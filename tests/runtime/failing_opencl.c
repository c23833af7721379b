/* The machine's own OpenCL library, but one of its functions fails when FAIL says so: "NAME STATUS", or
 * "NAME STATUS FIRST" for that call and all after it. The variable is read at every call.
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

#define GIVES_STATUS(name, parameters, arguments)                    \
    int32_t name parameters {                                        \
        int status = status_for(#name);                              \
        int32_t(*function) parameters = status ? NULL : real(#name); \
        return status ? status : function arguments;                 \
    }
#define GIVES_OBJECT(name, parameters, arguments)                \
    any name parameters {                                        \
        int status = status_for(#name);                          \
        any(*function) parameters = status ? NULL : real(#name); \
        if (status && error) *error = status;                    \
        return status ? NULL : function arguments;               \
    }

GIVES_STATUS(clEnqueueNDRangeKernel,
             (any q, any k, uint32_t n, const size_t *o, const size_t *g, const size_t *l, uint32_t w, any *e, any *d),
             (q, k, n, o, g, l, w, e, d))
GIVES_STATUS(clEnqueueReadBuffer, (any q, any m, uint32_t b, size_t o, size_t s, any p, uint32_t w, any *e, any *d),
             (q, m, b, o, s, p, w, e, d))
GIVES_STATUS(clEnqueueWriteBuffer, (any q, any m, uint32_t b, size_t o, size_t s, any p, uint32_t w, any *e, any *d),
             (q, m, b, o, s, p, w, e, d))
GIVES_STATUS(clFinish, (any q), (q))
GIVES_OBJECT(clCreateBuffer, (any c, uint64_t f, size_t s, any p, int32_t *error), (c, f, s, p, error))
GIVES_OBJECT(clCreateContext, (any p, uint32_t n, any d, any f, any u, int32_t *error), (p, n, d, f, u, error))
GIVES_OBJECT(clCreateProgramWithSource, (any c, uint32_t n, any t, any s, int32_t *error), (c, n, t, s, error))
