/* TVM's runtime through its stable C ABI: loaded by name, so that nothing of TVM is linked. */
#ifndef SAEVIT_TVM_H
#define SAEVIT_TVM_H

#include "../internal.h"

enum { VALUE_NONE = 0, VALUE_INT = 1, VALUE_POINTER = 4, VALUE_TEXT = 8, VALUE_OBJECT = 64, VALUE_TENSOR = 70, VALUE_ARRAY = 71 };

/* TVMFFIAny. */
typedef struct {
    int32_t kind;
    uint32_t padding;
    union {
        int64_t number;
        const char *text;
        void *object, *pointer;
    } is;
} tvm_value;

/* DLTensor. */
typedef struct {
    void *data;
    int32_t device_type, device_id, dimensions;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} tvm_tensor;

/* DLManagedTensor. */
typedef struct {
    tvm_tensor tensor;
    void *context;
    void (*release)(void *self);
} tvm_managed_tensor;

typedef struct tvm {
    int (*get_global)(const void *name, void **function);
    int (*call)(void *function, const tvm_value *arguments, int32_t count, tvm_value *result);
    int (*forget)(void *object);
    int (*import_tensor)(tvm_managed_tensor *tensor, int32_t alignment, int32_t contiguous, void **object);
    void (*take_error)(void **error);
} tvm;

/* Loads libtvm_ffi.so and libtvm_runtime.so from the folder, and libsaevit_opencl.so if OpenCL is needed. */
HIDDEN saevit_status saevit_tvm_load(tvm *t, const char *folder);

/* Calls a function; on failure the reason is saevit_last_error's. */
HIDDEN saevit_status saevit_tvm_call(const tvm *t, void *function, const tvm_value *arguments, int count, tvm_value *result);
HIDDEN saevit_status saevit_tvm_call_global(const tvm *t, const char *name, const tvm_value *arguments, int count,
                                     tvm_value *result);

/* Gives back the reference that a value holds, and empties it. */
HIDDEN void saevit_tvm_drop(const tvm *t, tvm_value *value);

/* The failure that TVM has left behind. */
HIDDEN saevit_status saevit_tvm_failure(const tvm *t);

HIDDEN tvm_value saevit_tvm_int(int64_t number);
HIDDEN tvm_value saevit_tvm_pointer(void *pointer);
HIDDEN tvm_value saevit_tvm_text(const char *text);

/* The tensor that a result is, or that at an index of an array; NULL if there is none. And what it looks like. */
HIDDEN const tvm_value *saevit_tvm_item(const tvm_value *value, size_t index);
HIDDEN const tvm_tensor *saevit_tvm_tensor(const tvm_value *value);

#endif
