/* saevit.h: run the one model that this SDK was made for.
 *
 * A program opens the model, runs it any number of times, and closes it. Every failure is a status and a sentence;
 * nothing here aborts, prints, or installs a handler. There is no global state but the text of each thread's last
 * error. Link `saevit_static.o` and `saevit_model.o` (nothing else is needed) or `saevit_shared.o` (which loads the
 * artifact and TVM's runtime): the functions are the same.
 */
#ifndef SAEVIT_H
#define SAEVIT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    SAEVIT_OK = 0,
    SAEVIT_BAD_ARGUMENT,  /* a null pointer, a wrong size: the caller can mend it */
    SAEVIT_BAD_FILE,      /* the artifact is missing, damaged, or another one */
    SAEVIT_WRONG_MACHINE, /* this processor cannot run the code */
    SAEVIT_NO_RUNTIME,    /* TVM's runtime libraries are missing or unfit (shared only) */
    SAEVIT_NO_MEMORY,     /* memory or threads ran out */
    SAEVIT_UNSUPPORTED,   /* this flavour, or this model, has no such thing */
    SAEVIT_FAILED,        /* the computation itself failed */
    SAEVIT_NO_DEVICE      /* there is no OpenCL device, or no driver for it (shared only) */
} saevit_status;

/* An open model. One inference at a time runs on it; threads that come meanwhile wait for their turn. */
typedef struct saevit saevit;

/* What an input or output looks like: row-major, without gaps. */
typedef struct {
    const char *name;
    const char *dtype; /* "float32" and so on, as NumPy says it */
    const int64_t *shape;
    size_t dimensions;
    size_t size; /* in bytes */
    size_t row;  /* in bytes, for one picture where any number of them is taken; else the size */
} saevit_tensor;

typedef struct {
    const char *model;
    const char *version; /* of the saevit-tvm that made the SDK */
    const char *target;
    const char *flavour;        /* "static" or "shared" */
    const char *weights_digest; /* "sha256:..." */
    const saevit_tensor *inputs;
    size_t input_count;
    const saevit_tensor *outputs;
    size_t output_count;
    const size_t *batches; /* smallest first, if built for several: then it takes any number of pictures, and shapes */
    size_t batch_count;    /* and sizes are those of the last; else NULL and 0 */
    const char *const *labels; /* one a class, or NULL */
    size_t label_count;
    int image_width, image_height; /* what saevit_run_image makes of a picture */
} saevit_description;

typedef struct {
    void *data;
    size_t size; /* in bytes */
} saevit_buffer;

typedef struct {
    const void *data;
    size_t size; /* in bytes */
} saevit_input;

/* One share of a kernel's work: call it with every index from 0 to count - 1, each once. */
typedef int (*saevit_task)(int index, int count, void *work);

/* Runs all the shares and returns when they are done: 0, or what a share returned that failed. */
typedef int (*saevit_parallel)(saevit_task task, int count, void *work, void *user);

/* All zero is a good default. */
typedef struct {
    int threads; /* for one inference; 0: one for every processor that is online */

    /* static only: memory to work in, aligned to 64 bytes, of saevit_workspace_size() bytes, left to the model
     * until saevit_close. NULL: it is allocated. */
    void *workspace;
    size_t workspace_size;

    /* static only: have the caller's own threads do the work, in as many shares as the model has threads; it then
     * starts none. Gets `user`, is called by whoever runs the model, and must not run the same model. NULL: the model's
     * own threads. */
    saevit_parallel parallel;
    void *user;

    /* shared only: the artifact, and the folder of libtvm_ffi.so, libtvm_runtime.so and, for a model that runs on an
     * OpenCL device, libsaevit_opencl.so. NULL: the artifact's own. */
    const char *artifact;
    const char *runtime;
} saevit_options;

/* What the model takes and gives. Any thread, any time; the answer is constant. */
const saevit_description *saevit_describe(void);

/* Bytes of workspace for so many threads (0 as in saevit_options); 0 if that many are impossible, and always 0
 * in the shared flavour, which has its own. Any thread, any time. */
size_t saevit_workspace_size(int threads);

/* Opens the model; options may be NULL. Any thread; open models are independent of one another. A child of fork must
 * open its own.
 * shared: the first call sets TVM_BIND_THREADS and TVM_THREAD_POOL_SPIN_COUNT in the environment unless they are
 * set, and loads TVM for the rest of the process: let no other thread touch the environment meanwhile. TVM itself ends
 * the process if the system refuses it a thread. */
saevit_status saevit_open(const saevit_options *options, saevit **model);

/* One inference of a model that takes one input. Sizes are in bytes and must be right; no alignment is asked for (64
 * bytes spares a copy of the input); outputs may lie anywhere but in the workspace. Any thread, also at the same time on
 * the same model. A model that was built for several batches takes any number of pictures, in as many rows of each input
 * and output: the function for so many computes them, or the next larger, and more than the largest go in turns.
 * static: allocates nothing. */
saevit_status saevit_run(saevit *model, const void *input, size_t input_size, const saevit_buffer *outputs,
                         size_t output_count);

/* The same for a model that takes several inputs: one each, in the order of the description. */
saevit_status saevit_run_inputs(saevit *model, const saevit_input *inputs, size_t input_count,
                                const saevit_buffer *outputs, size_t output_count);

/* The same for one picture of 8-bit RGB, rows from the top without gaps: resized, cropped and normalised as the model
 * was trained. (A model built with --input uint8 normalises itself: a frame of its size goes into saevit_run.) Allocates
 * while it resizes. Any thread, as saevit_run. */
saevit_status saevit_run_image(saevit *model, const uint8_t *rgb, int width, int height, const saevit_buffer *outputs,
                               size_t output_count);

/* Why this thread's last call failed, in one sentence; "" if none has. Good until this thread's next failure. */
const char *saevit_last_error(void);

/* Frees what saevit_open made; NULL is fine. No other thread may be using the model, nor use it afterwards. */
void saevit_close(saevit *model);

#ifdef __cplusplus
}
#endif

#endif
