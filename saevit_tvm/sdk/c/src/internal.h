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
    float scale, mean[3], deviation[3];
} preprocessing;

/* Generated: model.c. */
extern HIDDEN const saevit_description saevit_model;
extern HIDDEN const preprocessing saevit_preprocessing;
extern HIDDEN const char *const saevit_needed_arch;
extern HIDDEN const char *const saevit_needed_features[]; /* ends with NULL */
extern HIDDEN const int saevit_needs_opencl;               /* whether its kernels are for an OpenCL device */
extern HIDDEN const uint8_t saevit_artifact_digest[32];    /* the seal of the artifact that this describes */

/* static.c or shared.c */
extern HIDDEN const char saevit_flavour[];

/* common.c */
HIDDEN saevit_status saevit_fail(saevit_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));
HIDDEN saevit_status saevit_check_machine(void);
HIDDEN saevit_status saevit_check_buffers(const void *input, size_t input_size, const saevit_buffer *outputs,
                                          size_t output_count);
HIDDEN int saevit_thread_count(int asked); /* 0: impossible */

/* A thread that no signal of the program's disturbs; 0 if the system gives none. */
HIDDEN int saevit_start_thread(pthread_t *thread, void *(*work)(void *), void *argument);

/* image.c: the picture as the model's input, in memory to be freed; NULL after a failure. */
HIDDEN void *saevit_load_image(const uint8_t *rgb, int width, int height, saevit_status *status);

#endif
