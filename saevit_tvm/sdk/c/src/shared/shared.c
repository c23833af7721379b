/* The shared flavour: the artifact, run by TVM's virtual machine.
 *
 * A virtual machine belongs to the thread that made it, and so does TVM's pool of threads, which also changes that
 * thread's affinity. So every model has a thread of its own that computes; callers hand it their work and wait.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "artifact.h"
#include "tvm.h"

enum { MAGIC = 0x53485244, CPU_DEVICE = 1, OPENCL_DEVICE = 4, POOLED_MEMORY = 2, SHARE_ALL_CORES = -3 };

typedef enum { IDLE, OPEN, RUN, END } job;

const char saevit_flavour[] = "shared";

/* An input as an entry point takes it: TVM's tensor in the staging memory, and the one on the device, if that is not
 * the CPU. */
typedef struct {
    tvm_managed_tensor lent;
    tvm_value tensor, there;
} placed;

struct saevit {
    int magic, threads;
    pthread_mutex_t turn, lock;
    pthread_cond_t changed;
    pthread_t thread;
    job job;
    saevit_status status; /* how the last job went */
    char error[512];
    const char *artifact;
    const call_part *part;
    tvm tvm;
    tvm_value module, machine;
    tvm_value *functions; /* one an entry point */
    placed *inputs;       /* of each entry point, one after the other */
    tvm_value *arguments; /* of one call */
    void **staging;       /* of each input, for the most rows */
};

size_t saevit_workspace_size(int threads) {
    (void)threads;
    return 0;
}

/* On the model's own thread --------------------------------------------------- */

static saevit_status configure_threads(saevit *model) {
    cpu_set_t allowed;
    int cpus[CPU_SETSIZE], count = 0;
    if (!sched_getaffinity(0, sizeof allowed, &allowed))
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
            if (CPU_ISSET(cpu, &allowed)) cpus[count++] = cpu;
    char names[MOST_THREADS][12];
    tvm_value list[MOST_THREADS], made, nothing;
    for (int i = 0; i < model->threads; i++) {
        snprintf(names[i], sizeof names[i], "%d", count ? cpus[i % count] : i);
        list[i] = saevit_tvm_text(names[i]);
    }
    saevit_status status = saevit_tvm_call_global(&model->tvm, "ffi.Array", list, model->threads, &made);
    if (status) return status;
    const tvm_value arguments[] = {saevit_tvm_int(SHARE_ALL_CORES), saevit_tvm_int(model->threads), made};
    status = saevit_tvm_call_global(&model->tvm, "runtime.config_threadpool", arguments, 3, &nothing);
    saevit_tvm_drop(&model->tvm, &made);
    return status;
}

static saevit_status function_of(saevit *model, const tvm_value *module, const char *name, tvm_value *function) {
    const tvm_value arguments[] = {*module, saevit_tvm_text(name), saevit_tvm_int(0)};
    saevit_status status = saevit_tvm_call_global(&model->tvm, "ffi.ModuleGetFunction", arguments, 3, function);
    if (!status && function->kind == VALUE_NONE)
        status = saevit_fail(SAEVIT_BAD_FILE, "'%s' has no function '%s'", model->artifact, name);
    return status;
}

static saevit_status call_of(saevit *model, const tvm_value *module, const char *name, const tvm_value *arguments,
                             int count, tvm_value *result) {
    tvm_value function = {0};
    saevit_status status = function_of(model, module, name, &function);
    if (!status) status = saevit_tvm_call(&model->tvm, function.is.object, arguments, count, result);
    saevit_tvm_drop(&model->tvm, &function);
    return status;
}

static void keep(void *tensor) { (void)tensor; /* the memory is the model's */ }

static uint8_t type_code(const char *dtype) {
    return *dtype == 'b' ? 6 : *dtype == 'f' ? 2 : *dtype == 'u' ? 1 : 0;
}

static uint8_t type_bits(const char *dtype) {
    return *dtype == 'b' ? 8 : (uint8_t)atoi(dtype + strcspn(dtype, "0123456789"));
}

static placed *inputs_of(const saevit *model, size_t entry) { return model->inputs + entry * saevit_model.input_count; }

static saevit_status lend_staging(saevit *model, size_t entry, size_t input) {
    const saevit_tensor *described = &saevit_entries[entry].inputs[input];
    placed *place = &inputs_of(model, entry)[input];
    place->lent = (tvm_managed_tensor){
        .tensor = {.data = model->staging[input],
                   .device_type = CPU_DEVICE,
                   .dimensions = (int32_t)described->dimensions,
                   .type_code = type_code(described->dtype),
                   .type_bits = type_bits(described->dtype),
                   .type_lanes = 1,
                   .shape = (int64_t *)(uintptr_t)described->shape},
        .release = keep};
    void *object = NULL;
    if (model->tvm.import_tensor(&place->lent, 0, 1, &object)) return saevit_tvm_failure(&model->tvm);
    place->tensor = (tvm_value){.kind = VALUE_TENSOR, .is.object = object};
    if (!saevit_needs_opencl) return SAEVIT_OK;
    const tvm_value where[] = {place->tensor, saevit_tvm_int(OPENCL_DEVICE), saevit_tvm_int(0)};
    return saevit_tvm_call_global(&model->tvm, "vm.builtin.to_device", where, 3, &place->there);
}

static saevit_status prepare_entry(saevit *model, size_t entry) {
    saevit_status status = function_of(model, &model->machine, saevit_entries[entry].name, &model->functions[entry]);
    for (size_t i = 0; !status && i < saevit_model.input_count; i++) status = lend_staging(model, entry, i);
    return status;
}

/* Whether there is a device, before the artifact is loaded. */
static saevit_status require_device(saevit *model) {
    tvm_value nothing;
    if (saevit_tvm_call_global(&model->tvm, "saevit.opencl.require", NULL, 0, &nothing)) {
        char reason[400];
        snprintf(reason, sizeof reason, "%s", saevit_last_error());
        return saevit_fail(SAEVIT_NO_DEVICE, "'%s' needs OpenCL: %s", model->artifact, reason);
    }
    return SAEVIT_OK;
}

static saevit_status start_machine(saevit *model) {
    const tvm_value file[] = {saevit_tvm_text(model->artifact), saevit_tvm_text("so")};
    const tvm_value how[] = {saevit_tvm_int(OPENCL_DEVICE), saevit_tvm_int(0), saevit_tvm_int(POOLED_MEMORY),
                             saevit_tvm_int(CPU_DEVICE),    saevit_tvm_int(0), saevit_tvm_int(POOLED_MEMORY)};
    const int skipped = saevit_needs_opencl ? 0 : 3;
    tvm_value nothing;
    saevit_status status = configure_threads(model);
    if (!status && saevit_needs_opencl) status = require_device(model);
    if (!status) status = saevit_tvm_call_global(&model->tvm, "ffi.Module.load_from_file.so", file, 2, &model->module);
    if (!status) status = call_of(model, &model->module, "vm_load_executable", NULL, 0, &model->machine);
    if (!status) status = call_of(model, &model->machine, "vm_initialization", how + skipped, 6 - skipped, &nothing);
    for (size_t entry = 0; !status && entry < saevit_entry_count; entry++) status = prepare_entry(model, entry);
    return status;
}

static size_t bytes_of(const tvm_tensor *tensor) {
    size_t size = tensor->type_bits / 8;
    for (int32_t i = 0; i < tensor->dimensions; i++) size *= (size_t)tensor->shape[i];
    return size;
}

static saevit_status send_input(saevit *model, const placed *place) {
    const tvm_value both[] = {place->tensor, place->there};
    tvm_value nothing;
    return saevit_tvm_call_global(&model->tvm, "runtime.TVMTensorCopyFromTo", both, 2, &nothing);
}

/* All rows of a tensor that is on the device. */
static saevit_status fetch(saevit *model, const tvm_value *output, void *to, size_t size) {
    const tvm_value copied[] = {*output, saevit_tvm_pointer(to), saevit_tvm_int((int64_t)size)};
    tvm_value nothing;
    return saevit_tvm_call_global(&model->tvm, "runtime.TVMTensorCopyToBytes", copied, 3, &nothing);
}

static saevit_status take_output(saevit *model, const tvm_value *output, size_t index) {
    const call_part *part = model->part;
    const size_t row = saevit_model.outputs[index].row, size = saevit_entries[part->entry].rows * row;
    char *to = (char *)part->outputs[index].data + part->first * row;
    const tvm_tensor *tensor = output ? saevit_tvm_tensor(output) : NULL;
    if (!tensor || bytes_of(tensor) != size)
        return saevit_fail(SAEVIT_FAILED, "the library gave another output than '%s'", saevit_model.outputs[index].name);
    const size_t wanted = part->rows * row;
    if (tensor->device_type == CPU_DEVICE) {
        memcpy(to, (const char *)tensor->data + tensor->byte_offset, wanted);
        return SAEVIT_OK;
    }
    if (wanted == size) return fetch(model, output, to, size);
    void *all = malloc(size);
    if (!all) return saevit_fail(SAEVIT_NO_MEMORY, "there is no memory for %zu bytes of an output", size);
    const saevit_status status = fetch(model, output, all, size);
    if (!status) memcpy(to, all, wanted);
    free(all);
    return status;
}

static saevit_status compute(saevit *model) {
    const size_t entry = model->part->entry;
    tvm_value result = {0};
    saevit_status status = SAEVIT_OK;
    for (size_t i = 0; !status && i < saevit_model.input_count; i++) {
        const placed *place = &inputs_of(model, entry)[i];
        if (saevit_needs_opencl) status = send_input(model, place);
        model->arguments[i] = saevit_needs_opencl ? place->there : place->tensor;
    }
    if (!status)
        status = saevit_tvm_call(&model->tvm, model->functions[entry].is.object, model->arguments,
                                 (int)saevit_model.input_count, &result);
    for (size_t i = 0; !status && i < saevit_model.output_count; i++)
        status = take_output(model, saevit_tvm_item(&result, i), i);
    saevit_tvm_drop(&model->tvm, &result);
    return status;
}

static void stop_machine(saevit *model) {
    for (size_t i = 0; i < saevit_entry_count * saevit_model.input_count; i++) {
        saevit_tvm_drop(&model->tvm, &model->inputs[i].there);
        saevit_tvm_drop(&model->tvm, &model->inputs[i].tensor);
    }
    for (size_t entry = 0; entry < saevit_entry_count; entry++) saevit_tvm_drop(&model->tvm, &model->functions[entry]);
    saevit_tvm_drop(&model->tvm, &model->machine);
    saevit_tvm_drop(&model->tvm, &model->module);
}

static void *serve(void *argument) {
    saevit *model = argument;
    for (job job = IDLE; job != END;) {
        pthread_mutex_lock(&model->lock);
        while (model->job == IDLE) pthread_cond_wait(&model->changed, &model->lock);
        job = model->job;
        pthread_mutex_unlock(&model->lock);

        saevit_status status = SAEVIT_OK;
        if (job == OPEN) status = start_machine(model);
        if (job == RUN) status = compute(model);
        if (job == END) stop_machine(model);

        pthread_mutex_lock(&model->lock);
        model->status = status;
        if (status) snprintf(model->error, sizeof model->error, "%s", saevit_last_error());
        model->job = IDLE;
        pthread_cond_broadcast(&model->changed);
        pthread_mutex_unlock(&model->lock);
    }
    return NULL;
}

/* On the caller's thread --------------------------------------------------------- */

/* Has the model's thread do something, and waits until it is done. */
static saevit_status have_done(saevit *model, job job) {
    pthread_mutex_lock(&model->lock);
    model->job = job;
    pthread_cond_broadcast(&model->changed);
    while (model->job != IDLE) pthread_cond_wait(&model->changed, &model->lock);
    const saevit_status status = model->status;
    pthread_mutex_unlock(&model->lock);
    return status ? saevit_fail(status, "%s", model->error) : SAEVIT_OK;
}

/* Two habits of TVM can be changed in the environment only: it binds every pool to the first cores, so that two
 * models fight for the same ones, and its threads spin for a tenth of a second before they sleep. */
static void set_habits(void) {
    setenv("TVM_BIND_THREADS", "0", 0);
    setenv("TVM_THREAD_POOL_SPIN_COUNT", "20000", 0);
}

static saevit_status load_runtime(saevit *model, const saevit_options *options) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, set_habits);
    if (options->runtime) return saevit_tvm_load(&model->tvm, options->runtime);
    char folder[4096];
    const char *slash = strrchr(options->artifact, '/');
    const int length = slash ? (int)(slash - options->artifact) : 1;
    if ((size_t)length >= sizeof folder) return saevit_fail(SAEVIT_BAD_ARGUMENT, "the artifact's path is too long");
    snprintf(folder, sizeof folder, "%.*s", length, slash ? options->artifact : ".");
    return saevit_tvm_load(&model->tvm, length ? folder : "/");
}

static void release(saevit *model) {
    if (!model) return;
    for (size_t i = 0; model->staging && i < saevit_model.input_count; i++) free(model->staging[i]);
    free(model->staging);
    free(model->arguments);
    free(model->inputs);
    free(model->functions);
    free(model);
}

/* A model that computes nothing yet; NULL where there is no memory. */
static saevit *reserve(void) {
    const size_t inputs = saevit_model.input_count;
    saevit *made = calloc(1, sizeof *made);
    if (!made) return NULL;
    made->functions = calloc(saevit_entry_count, sizeof *made->functions);
    made->inputs = calloc(saevit_entry_count * inputs, sizeof *made->inputs);
    made->arguments = calloc(inputs, sizeof *made->arguments);
    made->staging = calloc(inputs, sizeof *made->staging);
    int done = made->functions && made->inputs && made->arguments && made->staging;
    for (size_t i = 0; done && i < inputs; i++)
        done = !posix_memalign(&made->staging[i], ALIGNMENT, saevit_model.inputs[i].size);
    if (done) return made;
    release(made);
    return NULL;
}

static int start_thread(saevit *model) {
    if (pthread_mutex_init(&model->turn, NULL)) return 0;
    if (pthread_mutex_init(&model->lock, NULL)) goto no_lock;
    if (pthread_cond_init(&model->changed, NULL)) goto no_condition;
    if (saevit_start_thread(&model->thread, serve, model)) return 1;
    pthread_cond_destroy(&model->changed);
no_condition:
    pthread_mutex_destroy(&model->lock);
no_lock:
    pthread_mutex_destroy(&model->turn);
    return 0;
}

static void end_thread(saevit *model) {
    have_done(model, END);
    pthread_join(model->thread, NULL);
    pthread_cond_destroy(&model->changed);
    pthread_mutex_destroy(&model->lock);
    pthread_mutex_destroy(&model->turn);
}

saevit_status saevit_open(const saevit_options *options, saevit **model) {
    if (!model) return saevit_fail(SAEVIT_BAD_ARGUMENT, "there is no place for the model: 'model' is NULL");
    *model = NULL;
    if (!options || !options->artifact)
        return saevit_fail(SAEVIT_BAD_ARGUMENT, "the shared flavour needs the artifact's path in its options");
    if (options->parallel)
        return saevit_fail(SAEVIT_UNSUPPORTED, "in the shared flavour TVM's own threads compute: use the static one");
    const int threads = saevit_thread_count(options->threads);
    if (!threads)
        return saevit_fail(SAEVIT_BAD_ARGUMENT, "%d threads are impossible: give 1 to %d, or 0", options->threads,
                           MOST_THREADS);
    saevit_status status = saevit_check_machine();
    if (!status) status = saevit_check_artifact(options->artifact);
    if (status) return status;
    saevit *made = reserve();
    char path[4096];
    /* Without a slash the loader would look for the file elsewhere. */
    snprintf(path, sizeof path, "%s%s", strchr(options->artifact, '/') ? "" : "./", options->artifact);
    if (!made) return saevit_fail(SAEVIT_NO_MEMORY, "there is no memory to open the model");
    made->threads = threads;
    made->artifact = path;
    status = load_runtime(made, options);
    if (!status && !start_thread(made)) status = saevit_fail(SAEVIT_NO_MEMORY, "the system gives no more threads");
    if (status) {
        release(made);
        return status;
    }
    status = have_done(made, OPEN);
    made->artifact = NULL;
    if (status) {
        char reason[512];
        snprintf(reason, sizeof reason, "%s", saevit_last_error());
        end_thread(made);
        release(made);
        return saevit_fail(status, "%s", reason);
    }
    made->magic = MAGIC;
    *model = made;
    return SAEVIT_OK;
}

int saevit_is_open(const saevit *model) { return model && model->magic == MAGIC; }

void saevit_begin(saevit *model) { pthread_mutex_lock(&model->turn); }

void saevit_end(saevit *model) { pthread_mutex_unlock(&model->turn); }

saevit_status saevit_compute(saevit *model, const call_part *part) {
    for (size_t i = 0; i < saevit_model.input_count; i++) saevit_stage(part, i, model->staging[i]);
    model->part = part;
    return have_done(model, RUN);
}

void saevit_close(saevit *model) {
    if (!model || model->magic != MAGIC) return;
    model->magic = 0;
    end_thread(model);
    release(model);
}
