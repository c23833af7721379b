/* What the files of the runtime share, and how the generated files describe the model to it. */
#ifndef SAEVIT_INTERNAL_H
#define SAEVIT_INTERNAL_H

#include <pthread.h>

#include "saevit.h"

#define HIDDEN __attribute__((visibility("hidden")))

enum { ALIGNMENT = 64, MOST_THREADS = 256 };

typedef enum { RESIZE_NEAREST, RESIZE_BILINEAR, RESIZE_BICUBIC } resize_method;

/* How a picture becomes an input. */
typedef struct {
    resize_method resize;
    int crop_center, channels_last;
    int enlarged_width, enlarged_height; /* a size whose middle is the model's input; 0: crop as little as can be */
    float scale, mean[3], deviation[3];
} preprocessing;

/* A function of the library: for so many pictures, or, with 1, for inputs as they are described. */
typedef struct {
    const char *name;
    size_t rows;
    const saevit_tensor *inputs; /* of so many pictures */
} entry_point;

/* What an entry point is to compute of what the caller gave: rows from `first` on, at most as many as it takes. */
typedef struct {
    size_t entry, first, rows;
    const saevit_input *inputs;
    const saevit_buffer *outputs;
} call_part;

/* Generated: model.c. */
extern HIDDEN const entry_point saevit_entries[]; /* smallest first */
extern HIDDEN const size_t saevit_entry_count;
extern HIDDEN const saevit_description saevit_model;
extern HIDDEN const preprocessing saevit_preprocessing;
extern HIDDEN const char *const saevit_needed_arch;
extern HIDDEN const char *const saevit_needed_features[]; /* ends with NULL */
extern HIDDEN const int saevit_needs_opencl;               /* whether its kernels are for an OpenCL device */
extern HIDDEN const uint8_t saevit_artifact_digest[32];    /* the seal of the artifact that this describes */

/* static.c or shared.c */
extern HIDDEN const char saevit_flavour[];
HIDDEN int saevit_is_open(const saevit *model);
HIDDEN void saevit_begin(saevit *model); /* waits for the others on the model; none comes between before saevit_end */
HIDDEN saevit_status saevit_compute(saevit *model, const call_part *part);
HIDDEN void saevit_end(saevit *model);

/* common.c */
HIDDEN saevit_status saevit_fail(saevit_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));
HIDDEN saevit_status saevit_check_machine(void);

/* Whether the sizes fit each other and the model; how many rows of its entry points they are. */
HIDDEN saevit_status saevit_check_buffers(const saevit_input *inputs, size_t input_count, const saevit_buffer *outputs,
                                          size_t output_count, size_t *rows);

/* The rows of an input that a part takes; and the same in a place that holds as many as the entry point takes. */
HIDDEN const void *saevit_rows_of(const call_part *part, size_t input);
HIDDEN void saevit_stage(const call_part *part, size_t input, void *place);
HIDDEN int saevit_thread_count(int asked); /* 0: impossible */

/* A thread that no signal of the program's disturbs; 0 if the system gives none. */
HIDDEN int saevit_start_thread(pthread_t *thread, void *(*work)(void *), void *argument);

/* image.c: the picture as the model's input, in memory to be freed; NULL after a failure. */
HIDDEN void *saevit_load_image(const uint8_t *rgb, int width, int height, saevit_status *status);

#endif
