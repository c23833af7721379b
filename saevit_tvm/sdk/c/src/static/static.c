/* The static flavour: the plan's kernels, called one after the other on memory that was laid out once.
 *
 * TVM's runtime is absent. Of it the kernels want four functions, which are at the end of this file.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "plan.h"
#include "pool.h"

enum { MAGIC = 0x53414556, CPU_DEVICE = 1, TENSOR_ARGUMENT = 7 };

/* Memory that kernels take and give back, mostly last in, first out. Each block begins with one of these. */
typedef struct block {
    _Alignas(ALIGNMENT) struct block *before;
    size_t size;
    int free;
} block;

typedef struct {
    unsigned char *memory;
    size_t size, used;
    block *last;
} scratch;

const char saevit_flavour[] = "static";

struct saevit {
    int magic, threads, owned;
    pthread_mutex_t turn;
    pool pool;
    saevit_parallel parallel;
    void *user;
    scratch *scratches;
    kernel_tensor *tensors;
    kernel_argument *arguments;
    unsigned char *arena, *staging;
    void **given; /* where each input lies during an inference */
};

/* For whom this thread computes, and which share of the work. */
static _Thread_local struct {
    saevit *model;
    int share, explained;
} here;

/* Memory ----------------------------------------------------------------- */

static size_t aligned(size_t size) { return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

/* Gives out parts of the workspace; with a NULL base it only counts. */
typedef struct {
    unsigned char *base;
    size_t used;
} layout;

static void *take(layout *l, size_t size) {
    void *part = l->base ? l->base + l->used : NULL;
    l->used += aligned(size);
    return part;
}

static size_t staging_size(void) {
    size_t size = 0;
    for (size_t i = 0; i < saevit_model.input_count; i++) size += aligned(saevit_model.inputs[i].size);
    return size;
}

/* Lays the model out, or only measures it. */
static saevit *lay_out(layout *l, int threads, pool_worker **workers) {
    saevit *model = take(l, sizeof *model);
    pool_worker *crew = take(l, (size_t)threads * sizeof *crew);
    scratch *scratches = take(l, (size_t)threads * sizeof *scratches);
    kernel_tensor *tensors = take(l, saevit_plan.tensor_count * sizeof *tensors);
    kernel_argument *arguments = take(l, saevit_plan.argument_count * sizeof *arguments);
    void **given = take(l, saevit_model.input_count * sizeof *given);
    unsigned char *staging = take(l, staging_size());
    unsigned char *arena = take(l, saevit_plan.arena_size);
    const size_t first = aligned(saevit_plan.shared_scratch), each = aligned(saevit_plan.scratch_size);
    unsigned char *scratch_memory = take(l, first + (size_t)threads * each);
    if (!model) return NULL;
    memset(model, 0, sizeof *model);
    model->scratches = scratches;
    model->tensors = tensors;
    model->arguments = arguments;
    model->given = given;
    model->staging = staging;
    model->arena = arena;
    scratches[0] = (scratch){.memory = scratch_memory, .size = first + each};
    for (int i = 1; i < threads; i++)
        scratches[i] = (scratch){.memory = scratch_memory + first + (size_t)i * each, .size = each};
    *workers = crew;
    return model;
}

size_t saevit_workspace_size(int threads) {
    layout l = {0};
    pool_worker *workers;
    threads = saevit_thread_count(threads);
    if (!threads) return 0;
    lay_out(&l, threads, &workers);
    return l.used;
}

static void fill_tensors(saevit *model) {
    for (size_t i = 0; i < saevit_plan.tensor_count; i++) {
        const plan_tensor *tensor = &saevit_plan.tensors[i];
        unsigned char *base = model->arena;
        if (tensor->place == IN_WEIGHTS) base = (unsigned char *)(uintptr_t)saevit_weights; /* kernels only read them */
        model->tensors[i] = (kernel_tensor){
            .data = tensor->place == IN_INPUT ? NULL : base + tensor->offset,
            .device_type = CPU_DEVICE,
            .dimensions = tensor->dimensions,
            .type_code = tensor->type_code,
            .type_bits = tensor->type_bits,
            .type_lanes = 1,
            .shape = tensor->shape,
        };
    }
    kernel_argument *argument = model->arguments;
    for (size_t s = 0; s < saevit_plan.step_count; s++)
        for (int i = 0; i < saevit_plan.steps[s].count; i++)
            *argument++ = (kernel_argument){
                .kind = TENSOR_ARGUMENT, .value.pointer = &model->tensors[saevit_plan.steps[s].tensors[i]]};
}

/* Opening and closing ------------------------------------------------------ */

static saevit_status find_memory(const saevit_options *options, int threads, layout *l) {
    const size_t needed = saevit_workspace_size(threads);
    if (options->workspace) {
        if ((uintptr_t)options->workspace % ALIGNMENT)
            return saevit_fail(SAEVIT_BAD_ARGUMENT, "the workspace must be aligned to %d bytes", ALIGNMENT);
        if (options->workspace_size < needed)
            return saevit_fail(SAEVIT_BAD_ARGUMENT, "the workspace has %zu bytes, and %d threads need %zu",
                               options->workspace_size, threads, needed);
        l->base = options->workspace;
        return SAEVIT_OK;
    }
    void *memory = NULL;
    if (posix_memalign(&memory, ALIGNMENT, needed))
        return saevit_fail(SAEVIT_NO_MEMORY, "there is no memory for a workspace of %zu bytes", needed);
    l->base = memory;
    return SAEVIT_OK;
}

saevit_status saevit_open(const saevit_options *options, saevit **model) {
    static const saevit_options defaults;
    options = options ? options : &defaults;
    if (!model) return saevit_fail(SAEVIT_BAD_ARGUMENT, "there is no place for the model: 'model' is NULL");
    *model = NULL;
    const int threads = saevit_thread_count(options->threads);
    if (!threads)
        return saevit_fail(SAEVIT_BAD_ARGUMENT, "%d threads are impossible: give 1 to %d, or 0", options->threads,
                           MOST_THREADS);
    saevit_status status = saevit_check_machine();
    if (status) return status;
    layout l = {0};
    if ((status = find_memory(options, threads, &l))) return status;
    pool_worker *workers;
    saevit *made = lay_out(&l, threads, &workers);
    fill_tensors(made);
    made->threads = threads;
    made->owned = !options->workspace;
    made->parallel = options->parallel ? options->parallel : saevit_pool_run;
    made->user = options->parallel ? options->user : &made->pool;
    int started = !pthread_mutex_init(&made->turn, NULL);
    if (started && !saevit_pool_start(&made->pool, workers, options->parallel ? 0 : threads - 1)) {
        pthread_mutex_destroy(&made->turn);
        started = 0;
    }
    if (!started) {
        if (made->owned) free(made);
        return saevit_fail(SAEVIT_NO_MEMORY, "the system gives no more threads: %d were asked for", threads);
    }
    made->magic = MAGIC;
    *model = made;
    return SAEVIT_OK;
}

void saevit_close(saevit *model) {
    if (!model || model->magic != MAGIC) return;
    model->magic = 0;
    saevit_pool_stop(&model->pool);
    pthread_mutex_destroy(&model->turn);
    if (model->owned) free(model);
}

/* Running -------------------------------------------------------------------- */

int saevit_is_open(const saevit *model) { return model && model->magic == MAGIC; }

void saevit_begin(saevit *model) { pthread_mutex_lock(&model->turn); }

void saevit_end(saevit *model) { pthread_mutex_unlock(&model->turn); }

/* The caller's own memory where it can be. */
static void place_inputs(saevit *model, const call_part *part) {
    unsigned char *staging = model->staging;
    for (size_t i = 0; i < saevit_model.input_count; i++) {
        void *data = (void *)(uintptr_t)saevit_rows_of(part, i); /* kernels only read it */
        if ((uintptr_t)data % ALIGNMENT || part->rows != saevit_entries[part->entry].rows) {
            saevit_stage(part, i, staging);
            data = staging;
        }
        model->given[i] = data;
        staging += aligned(saevit_model.inputs[i].size);
    }
    for (size_t i = 0; i < saevit_plan.tensor_count; i++)
        if (saevit_plan.tensors[i].place == IN_INPUT)
            model->tensors[i].data = model->given[saevit_plan.tensors[i].offset];
}

static saevit_status run_steps(saevit *model, const plan_entry *entry) {
    const kernel_argument *arguments = model->arguments + entry->first_argument;
    for (size_t s = 0; s < entry->step_count; s++) {
        const plan_step *step = &saevit_plan.steps[entry->first_step + s];
        kernel_argument result = {0};
        here.explained = 0;
        if (step->run(NULL, arguments, step->count, &result))
            return here.explained ? SAEVIT_FAILED : saevit_fail(SAEVIT_FAILED, "the kernel '%s' failed", step->name);
        arguments += step->count;
    }
    return SAEVIT_OK;
}

static void take_outputs(const saevit *model, const plan_entry *entry, const call_part *part) {
    for (size_t i = 0; i < saevit_model.output_count; i++) {
        const size_t row = saevit_model.outputs[i].row;
        char *to = (char *)part->outputs[i].data + part->first * row;
        memcpy(to, model->tensors[entry->outputs[i]].data, part->rows * row);
    }
}

saevit_status saevit_compute(saevit *model, const call_part *part) {
    const plan_entry *entry = &saevit_plan.entries[part->entry];
    saevit *const before = here.model; /* a caller's own parallel function may run another model */
    const int share_before = here.share;
    here.model = model;
    here.share = 0;
    for (int i = 0; i < model->threads; i++) { /* a kernel that failed has left things lying about */
        model->scratches[i].used = 0;
        model->scratches[i].last = NULL;
    }
    place_inputs(model, part);
    const saevit_status status = run_steps(model, entry);
    if (!status) take_outputs(model, entry, part);
    here.model = before;
    here.share = share_before;
    return status;
}

/* What kernels call ------------------------------------------------------------ */

typedef struct {
    void *barrier;
    int32_t count;
} task_group;

typedef int (*task_body)(int index, task_group *group, void *data);

typedef struct {
    saevit *model;
    task_body body;
    void *data;
    int count;
} parallel_work;

/* A share is every so-manieth task. */
static int run_share(int index, int count, void *argument) {
    const parallel_work *work = argument;
    task_group group = {NULL, work->count};
    saevit *const before = here.model;
    const int share_before = here.share;
    int failed = index < 0 || count < 1 || index >= count || count > work->model->threads;
    here.model = work->model;
    here.share = index;
    for (int task = index; !failed && task < work->count; task += count) failed = work->body(task, &group, work->data);
    here.model = before;
    here.share = share_before;
    return failed;
}

HIDDEN void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count);

static int launch(task_body body, void *data, int count) {
    saevit *model = here.model;
    parallel_work work = {model, body, data, count > 0 ? count : model->threads};
    if (model->threads == 1) return run_share(0, 1, &work);
    return model->parallel(run_share, model->threads, &work, model->user);
}

static void *take_scratch(int device, int number, uint64_t size, int code, int bits) {
    (void)device, (void)number, (void)code, (void)bits;
    scratch *s = &here.model->scratches[here.share];
    const size_t room = s->size - s->used;
    if (size > room || sizeof(block) + aligned(size) > room) {
        saevit_fail(SAEVIT_FAILED, "a kernel needs more scratch memory than was planned");
        here.explained = 1;
        return NULL;
    }
    block *b = (block *)(s->memory + s->used);
    *b = (block){.before = s->last, .size = sizeof(block) + aligned(size)};
    s->last = b;
    s->used += b->size;
    return b + 1;
}

static int give_back_scratch(int device, int number, void *memory) {
    (void)device, (void)number;
    scratch *s = &here.model->scratches[here.share];
    ((block *)memory - 1)->free = 1;
    for (; s->last && s->last->free; s->last = s->last->before) s->used -= s->last->size;
    return 0;
}

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
    char text[400];
    size_t used = 0;
    for (int32_t i = 0; i < count; i++)
        for (const char *c = parts[i]; *c && used + 1 < sizeof text; c++) text[used++] = *c == '\n' ? ' ' : *c;
    text[used] = '\0';
    saevit_fail(SAEVIT_FAILED, "%s: %s", kind, text);
    here.explained = 1;
}

/* Kernels find most of what they call through variables, which they define weakly and these replace. */
HIDDEN int (*const __TVMBackendParallelLaunch)(task_body, void *, int) = launch;
HIDDEN void *(*const __TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = take_scratch;
HIDDEN int (*const __TVMBackendFreeWorkspace)(int, int, void *) = give_back_scratch;
