/* How the generated plan.c describes an inference: kernels in order, and where their tensors lie. */
#ifndef SAEVIT_PLAN_H
#define SAEVIT_PLAN_H

#include "../internal.h"

/* The calling convention of TVM's kernels: TVMFFIAny and DLTensor. */
typedef struct {
    int32_t kind;
    uint32_t padding;
    union {
        int64_t number;
        void *pointer;
    } value;
} kernel_argument;

typedef struct {
    void *data;
    int32_t device_type, device_id, dimensions;
    uint8_t type_code, type_bits;
    uint16_t type_lanes;
    const int64_t *shape, *strides;
    uint64_t byte_offset;
} kernel_tensor;

typedef int (*kernel)(void *self, const kernel_argument *arguments, int32_t count, kernel_argument *result);

typedef enum { IN_ARENA, IN_WEIGHTS, IN_INPUT } place;

typedef struct {
    place place;
    size_t offset; /* in bytes; of an input, its number */
    uint8_t type_code, type_bits;
    int dimensions;
    const int64_t *shape;
} plan_tensor;

typedef struct {
    kernel run;
    const char *name;
    const uint16_t *tensors;
    int count;
} plan_step;

/* One inference by an entry point: its part of all steps, and where their arguments begin. */
typedef struct {
    size_t first_step, step_count, first_argument;
    const uint16_t *outputs;
} plan_entry;

typedef struct {
    const plan_tensor *tensors;
    size_t tensor_count;
    const plan_step *steps;
    size_t step_count, argument_count;
    const plan_entry *entries;
    size_t arena_size;
    size_t shared_scratch; /* for the thread that calls the kernels */
    size_t scratch_size;   /* for each thread, that one too */
} plan;

extern HIDDEN const plan saevit_plan;
extern HIDDEN const unsigned char saevit_weights[];

#endif
