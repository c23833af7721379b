#define _GNU_SOURCE
#include "tvm.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

/* TVMFFIByteArray. */
typedef struct {
    const char *data;
    size_t size;
} bytes;

#define OPENCL_ERROR "OpenCLError"

/* Every object begins with its counts, its kind and its deleter. */
enum { OBJECT_HEADER = 24 };

static const void *inside(const void *object) { return (const char *)object + OBJECT_HEADER; }

static saevit_status open_library(const char *folder, const char *name, void **library) {
    char path[4096];
    if ((size_t)snprintf(path, sizeof path, "%s/%s", folder, name) >= sizeof path)
        return saevit_fail(SAEVIT_NO_RUNTIME, "the path of TVM's runtime is too long");
    *library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (*library) return SAEVIT_OK;
    return saevit_fail(SAEVIT_NO_RUNTIME, "TVM's runtime cannot be loaded: %s", dlerror());
}

saevit_status saevit_tvm_load(tvm *t, const char *folder) {
    void *ffi = NULL, *runtime = NULL, *opencl = NULL;
    saevit_status status = open_library(folder, "libtvm_ffi.so", &ffi);
    if (!status) status = open_library(folder, "libtvm_runtime.so", &runtime);
    if (!status && saevit_needs_opencl) status = open_library(folder, "libsaevit_opencl.so", &opencl);
    if (status) return status;
    const struct {
        const char *name;
        void *place;
    } wanted[] = {
        {"TVMFFIFunctionGetGlobal", &t->get_global}, {"TVMFFIFunctionCall", &t->call},
        {"TVMFFIObjectDecRef", &t->forget},          {"TVMFFITensorFromDLPack", &t->import_tensor},
        {"TVMFFIErrorMoveFromRaised", &t->take_error},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *symbol = dlsym(ffi, wanted[i].name);
        if (!symbol) return saevit_fail(SAEVIT_NO_RUNTIME, "'%s' has no %s: it is another version", folder, wanted[i].name);
        memcpy(wanted[i].place, &symbol, sizeof symbol);
    }
    return SAEVIT_OK;
}

saevit_status saevit_tvm_failure(const tvm *t) {
    void *error = NULL;
    t->take_error(&error);
    if (!error) return saevit_fail(SAEVIT_FAILED, "TVM's runtime failed and gave no reason");
    const bytes *text = inside(error); /* the kind, then the message */
    char line[400];
    size_t used = 0;
    for (size_t i = 0; i < text[1].size && used + 1 < sizeof line; i++) {
        const char c = text[1].data[i] == '\n' ? ' ' : text[1].data[i];
        if (c != ' ' || !used || line[used - 1] != ' ') line[used++] = c;
    }
    line[used] = '\0';
    /* Our own plugin's errors are meant for the user. */
    if (text[0].size == strlen(OPENCL_ERROR) && !memcmp(text[0].data, OPENCL_ERROR, text[0].size))
        saevit_fail(SAEVIT_FAILED, "%s", line);
    else
        saevit_fail(SAEVIT_FAILED, "TVM's runtime failed with %.*s: %s", (int)text[0].size, text[0].data, line);
    t->forget(error);
    return SAEVIT_FAILED;
}

saevit_status saevit_tvm_call(const tvm *t, void *function, const tvm_value *arguments, int count, tvm_value *result) {
    *result = (tvm_value){0};
    return t->call(function, arguments, count, result) ? saevit_tvm_failure(t) : SAEVIT_OK;
}

saevit_status saevit_tvm_call_global(const tvm *t, const char *name, const tvm_value *arguments, int count,
                              tvm_value *result) {
    const bytes key = {name, strlen(name)};
    void *function = NULL;
    if (t->get_global(&key, &function) || !function)
        return saevit_fail(SAEVIT_NO_RUNTIME, "TVM's runtime has no '%s': it is another version", name);
    saevit_status status = saevit_tvm_call(t, function, arguments, count, result);
    t->forget(function);
    return status;
}

void saevit_tvm_drop(const tvm *t, tvm_value *value) {
    if (value->kind >= VALUE_OBJECT) t->forget(value->is.object);
    *value = (tvm_value){0};
}

tvm_value saevit_tvm_int(int64_t number) { return (tvm_value){.kind = VALUE_INT, .is.number = number}; }
tvm_value saevit_tvm_pointer(void *pointer) { return (tvm_value){.kind = VALUE_POINTER, .is.pointer = pointer}; }
tvm_value saevit_tvm_text(const char *text) { return (tvm_value){.kind = VALUE_TEXT, .is.text = text}; }

const tvm_value *saevit_tvm_item(const tvm_value *value, size_t index) {
    if (value->kind == VALUE_TENSOR && index == 0) return value;
    if (value->kind != VALUE_ARRAY) return NULL;
    const struct {
        const tvm_value *items;
        int64_t size;
    } *array = inside(value->is.object);
    return index < (size_t)array->size ? saevit_tvm_item(&array->items[index], 0) : NULL;
}

const tvm_tensor *saevit_tvm_tensor(const tvm_value *value) { return inside(value->is.object); }
