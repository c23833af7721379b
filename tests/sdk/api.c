/* Holds the C API to its promises; C11 and C++17.  api | api ARTIFACT RUNTIME_FOLDER */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "saevit.h"

enum { MOST = 8, CALLERS = 8, TURNS = 12, CANARY = 0x5a };

static int failures, is_static;
static const char *artifact, *runtime;

#define CHECK(condition)                                                                        \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            failures++;                                                                         \
            fprintf(stderr, "line %d: %s does not hold (%s)\n", __LINE__, #condition, saevit_last_error()); \
        }                                                                                       \
    } while (0)

static const saevit_description *about(void) { return saevit_describe(); }

static saevit_options options(int threads) {
    saevit_options o;
    memset(&o, 0, sizeof o);
    o.threads = threads;
    o.artifact = artifact;
    o.runtime = runtime;
    return o;
}

static saevit *opened(int threads) {
    saevit_options o = options(threads);
    saevit *model = NULL;
    CHECK(saevit_open(&o, &model) == SAEVIT_OK);
    return model;
}

/* An input that is the same every time for the same seed, `offset` bytes off alignment. */
static float *make_input(unsigned seed, size_t offset, void **memory) {
    *memory = malloc(about()->inputs[0].size + 128);
    unsigned char *start = (unsigned char *)*memory;
    start += (64 - (size_t)start % 64) % 64 + offset;
    for (size_t i = 0; i < about()->inputs[0].size / sizeof(float); i++) {
        seed = seed * 1664525u + 1013904223u;
        const float value = (float)(seed >> 8) / 8388608.0f - 1.0f;
        memcpy(start + i * sizeof value, &value, sizeof value);
    }
    return (float *)(void *)start;
}

static size_t make_outputs(saevit_buffer *outputs) {
    for (size_t i = 0; i < about()->output_count; i++) {
        outputs[i].size = about()->outputs[i].size;
        outputs[i].data = calloc(1, outputs[i].size);
    }
    return about()->output_count;
}

static void free_outputs(saevit_buffer *outputs) {
    for (size_t i = 0; i < about()->output_count; i++) free(outputs[i].data);
}

static int same(const saevit_buffer *a, const saevit_buffer *b) {
    for (size_t i = 0; i < about()->output_count; i++)
        if (a[i].size != b[i].size || memcmp(a[i].data, b[i].data, a[i].size)) return 0;
    return 1;
}

static void check_description(void) {
    const saevit_description *d = about();
    CHECK(!strcmp(d->flavour, is_static ? "static" : "shared"));
    CHECK(strlen(d->model) && strlen(d->version) && strlen(d->target));
    CHECK(!strncmp(d->weights_digest, "sha256:", 7));
    CHECK(d->input_count == 1 && !d->batch_count && d->inputs[0].row == d->inputs[0].size);
    CHECK(d->inputs[0].dimensions == 4 && d->inputs[0].shape[1] == 3);
    CHECK(d->output_count >= 1 && d->output_count <= MOST);
    CHECK(d->image_width == d->inputs[0].shape[3] && d->image_height == d->inputs[0].shape[2]);
}

static void check_opening(void) {
    saevit_options o = options(1);
    saevit *model = NULL;
    CHECK(saevit_open(&o, NULL) == SAEVIT_BAD_ARGUMENT);
    CHECK(strstr(saevit_last_error(), "NULL"));
    const int impossible[] = {-1, 257, 1 << 30};
    for (size_t i = 0; i < sizeof impossible / sizeof *impossible; i++) {
        o.threads = impossible[i];
        model = (saevit *)&o;
        CHECK(saevit_open(&o, &model) == SAEVIT_BAD_ARGUMENT && model == NULL);
        CHECK(saevit_workspace_size(impossible[i]) == 0);
    }
    if (!is_static) CHECK(saevit_open(NULL, &model) == SAEVIT_BAD_ARGUMENT && strstr(saevit_last_error(), "artifact"));
    saevit_close(NULL);
}

static void check_workspace(void) {
    if (!is_static) {
        CHECK(saevit_workspace_size(1) == 0);
        return;
    }
    const size_t size = saevit_workspace_size(2);
    unsigned char *memory = (unsigned char *)malloc(size + 256), *start = memory + (64 - (size_t)memory % 64);
    saevit_options o = options(2);
    saevit *model = NULL;
    memset(memory, CANARY, size + 256);
    o.workspace = start + 4;
    o.workspace_size = size;
    CHECK(saevit_open(&o, &model) == SAEVIT_BAD_ARGUMENT && strstr(saevit_last_error(), "aligned"));
    o.workspace = start;
    o.workspace_size = size - 1;
    CHECK(saevit_open(&o, &model) == SAEVIT_BAD_ARGUMENT && strstr(saevit_last_error(), "workspace"));
    o.workspace_size = size;
    CHECK(saevit_open(&o, &model) == SAEVIT_OK);
    saevit_buffer outputs[MOST];
    void *input_memory;
    const float *input = make_input(1, 4, &input_memory);
    const size_t count = make_outputs(outputs);
    CHECK(saevit_run(model, input, about()->inputs[0].size, outputs, count) == SAEVIT_OK);
    saevit_close(model);
    CHECK(saevit_run(model, input, about()->inputs[0].size, outputs, count) == SAEVIT_BAD_ARGUMENT);
    for (unsigned char *byte = memory; byte < memory + size + 256; byte++)
        if (byte < start || byte >= start + size) CHECK(*byte == CANARY);
    free_outputs(outputs);
    free(input_memory);
    free(memory);
}

static void check_arguments(saevit *model) {
    saevit_buffer outputs[MOST];
    void *memory;
    const float *input = make_input(2, 0, &memory);
    const size_t size = about()->inputs[0].size, count = make_outputs(outputs);
    CHECK(saevit_run(NULL, input, size, outputs, count) == SAEVIT_BAD_ARGUMENT);
    CHECK(saevit_run(model, NULL, size, outputs, count) == SAEVIT_BAD_ARGUMENT);
    CHECK(saevit_run(model, input, size - 1, outputs, count) == SAEVIT_BAD_ARGUMENT);
    CHECK(saevit_run(model, input, 0, outputs, count) == SAEVIT_BAD_ARGUMENT);
    CHECK(saevit_run(model, input, size, NULL, count) == SAEVIT_BAD_ARGUMENT);
    CHECK(saevit_run(model, input, size, outputs, count + 1) == SAEVIT_BAD_ARGUMENT);
    CHECK(saevit_run(model, input, size, outputs, 0) == SAEVIT_BAD_ARGUMENT);
    outputs[0].size--;
    CHECK(saevit_run(model, input, size, outputs, count) == SAEVIT_BAD_ARGUMENT);
    CHECK(strstr(saevit_last_error(), about()->outputs[0].name));
    outputs[0].size++;
    void *data = outputs[0].data;
    outputs[0].data = NULL;
    CHECK(saevit_run(model, input, size, outputs, count) == SAEVIT_BAD_ARGUMENT);
    outputs[0].data = data;
    const saevit_input inputs[2] = {{input, size}, {input, size}};
    CHECK(saevit_run_inputs(model, inputs, 2, outputs, count) == SAEVIT_BAD_ARGUMENT);
    CHECK(strstr(saevit_last_error(), "2 inputs"));
    CHECK(saevit_run_inputs(model, NULL, 1, outputs, count) == SAEVIT_BAD_ARGUMENT);
    CHECK(saevit_run_inputs(model, inputs, 1, outputs, count) == SAEVIT_OK);
    const uint8_t pixel[3] = {1, 2, 3};
    CHECK(saevit_run_image(model, NULL, 1, 1, outputs, count) == SAEVIT_BAD_ARGUMENT);
    CHECK(saevit_run_image(model, pixel, 0, 1, outputs, count) == SAEVIT_BAD_ARGUMENT);
    CHECK(saevit_run_image(model, pixel, 1, -1, outputs, count) == SAEVIT_BAD_ARGUMENT);
    CHECK(saevit_run_image(model, pixel, 1 << 20, 1 << 20, outputs, count) == SAEVIT_BAD_ARGUMENT);
    CHECK(saevit_run_image(NULL, pixel, 1, 1, outputs, count) == SAEVIT_BAD_ARGUMENT);
    CHECK(saevit_run_image(model, pixel, 1, 1, outputs, count) == SAEVIT_OK);
    free_outputs(outputs);
    free(memory);
}

static void check_alignment(saevit *model) {
    saevit_buffer wanted[MOST], got[MOST], shifted[MOST];
    const size_t size = about()->inputs[0].size, count = make_outputs(wanted);
    void *memory;
    const float *input = make_input(3, 0, &memory);
    CHECK(saevit_run(model, input, size, wanted, count) == SAEVIT_OK);
    free(memory);
    const size_t offsets[] = {1, 2, 4, 16, 60};
    for (size_t i = 0; i < sizeof offsets / sizeof *offsets; i++) {
        make_outputs(got);
        for (size_t j = 0; j < count; j++) {
            shifted[j].size = got[j].size;
            shifted[j].data = (char *)malloc(got[j].size + 64) + offsets[i];
        }
        input = make_input(3, offsets[i], &memory);
        CHECK(saevit_run(model, input, size, shifted, count) == SAEVIT_OK);
        for (size_t j = 0; j < count; j++) {
            memcpy(got[j].data, shifted[j].data, got[j].size);
            free((char *)shifted[j].data - offsets[i]);
        }
        CHECK(same(wanted, got));
        free_outputs(got);
        free(memory);
    }
    free_outputs(wanted);
}

/* The caller's own "threads": one after the other, last first. */
static int calls;

static int backwards(saevit_task task, int count, void *work, void *user) {
    int failed = 0;
    CHECK(user == (void *)&calls);
    calls++;
    for (int index = count - 1; index >= 0; index--) failed |= task(index, count, work);
    return failed;
}

static int broken(saevit_task task, int count, void *work, void *user) {
    (void)user;
    CHECK(task(-1, count, work) != 0);
    CHECK(task(count, count, work) != 0);
    CHECK(task(0, 1000, work) != 0);
    return 1;
}

static saevit_status run_with(saevit_parallel parallel, const float *input, saevit_buffer *outputs) {
    saevit_options o = options(3);
    saevit *model = NULL;
    o.parallel = parallel;
    o.user = &calls;
    saevit_status status = saevit_open(&o, &model);
    if (!status) status = saevit_run(model, input, about()->inputs[0].size, outputs, about()->output_count);
    saevit_close(model);
    return status;
}

static void check_parallel(void) {
    saevit_buffer wanted[MOST], got[MOST];
    void *memory;
    const float *input = make_input(4, 0, &memory);
    make_outputs(wanted);
    make_outputs(got);
    if (is_static) {
        CHECK(run_with(NULL, input, wanted) == SAEVIT_OK);
        CHECK(run_with(backwards, input, got) == SAEVIT_OK);
        CHECK(calls > 0 && same(wanted, got));
        CHECK(run_with(broken, input, got) == SAEVIT_FAILED);
        CHECK(strstr(saevit_last_error(), "failed"));
    } else
        CHECK(run_with(backwards, input, got) == SAEVIT_UNSUPPORTED);
    free_outputs(wanted);
    free_outputs(got);
    free(memory);
}

/* No signal of the program's lands on a thread of the model's, where a handler would not expect to be. */
static pthread_t main_thread;
static volatile sig_atomic_t elsewhere, arrived;

static void note_where(int number) {
    (void)number;
    arrived++;
    elsewhere |= !pthread_equal(pthread_self(), main_thread);
}

static void check_signals(void) {
    sigset_t one, before;
    struct timespec moment = {0, 20000000};
    main_thread = pthread_self();
    sigemptyset(&one);
    sigaddset(&one, SIGUSR1);
    signal(SIGUSR1, note_where);
    saevit *model = opened(3);
    pthread_sigmask(SIG_BLOCK, &one, &before);
    kill(getpid(), SIGUSR1); /* for whichever thread will have it */
    nanosleep(&moment, NULL);
    CHECK(!arrived);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    CHECK(arrived == 1 && !elsewhere);
    saevit_close(model);
}

/* Many threads ------------------------------------------------------------ */

typedef struct {
    saevit *model;
    unsigned seed;
    int wrong;
} caller;

static void *call_often(void *argument) {
    caller *me = (caller *)argument;
    saevit_buffer first[MOST], again[MOST];
    void *memory;
    const float *input = make_input(me->seed, me->seed % 2 ? 4 : 0, &memory);
    const size_t size = about()->inputs[0].size, count = make_outputs(first);
    make_outputs(again);
    me->wrong = saevit_run(me->model, input, size, first, count) != SAEVIT_OK;
    for (int turn = 0; turn < TURNS; turn++) {
        me->wrong |= saevit_run(me->model, input, size, again, count) != SAEVIT_OK || !same(first, again);
        /* Everyone's errors are his own. */
        me->wrong |= saevit_run(me->model, input, size - me->seed, again, count) != SAEVIT_BAD_ARGUMENT;
        char said[32];
        snprintf(said, sizeof said, "%zu bytes", size - me->seed);
        me->wrong |= !strstr(saevit_last_error(), said);
    }
    free_outputs(first);
    free_outputs(again);
    free(memory);
    return NULL;
}

static void check_callers(int handles) {
    saevit *models[CALLERS];
    caller callers[CALLERS];
    pthread_t threads[CALLERS];
    for (int i = 0; i < handles; i++) models[i] = opened(2);
    for (int i = 0; i < CALLERS; i++) {
        callers[i].model = models[i % handles];
        callers[i].seed = 10u + (unsigned)i;
        CHECK(!pthread_create(&threads[i], NULL, call_often, &callers[i]));
    }
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(threads[i], NULL);
        CHECK(!callers[i].wrong);
    }
    for (int i = 0; i < handles; i++) saevit_close(models[i]);
}

int main(int argc, char **argv) {
    is_static = argc < 2;
    artifact = argc > 1 ? argv[1] : NULL;
    runtime = argc > 2 ? argv[2] : NULL;
    check_description();
    check_opening();
    check_workspace();
    saevit *model = opened(1);
    check_arguments(model);
    check_alignment(model);
    saevit_close(model);
    check_parallel();
    check_signals();
    check_callers(1);
    check_callers(CALLERS);
    printf("%d failures\n", failures);
    return failures != 0;
}
