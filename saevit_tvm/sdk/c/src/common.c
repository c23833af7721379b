/* What both flavours do alike: say what failed, look at the processor, check what the caller gives. */
#define _GNU_SOURCE
#include "internal.h"

#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

#if defined(__x86_64__)
static const char ARCH[] = "x86_64";
#elif defined(__aarch64__)
static const char ARCH[] = "aarch64";
#elif defined(__riscv) && __riscv_xlen == 64
static const char ARCH[] = "riscv64";
#else
static const char ARCH[] = "another processor";
#endif

static _Thread_local char last_error[512];

const char *saevit_last_error(void) { return last_error; }

saevit_status saevit_fail(saevit_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

const saevit_description *saevit_describe(void) { return &saevit_model; }

int saevit_thread_count(int asked) {
    if (asked == 0) {
        long online = sysconf(_SC_NPROCESSORS_ONLN);
        asked = online < 1 ? 1 : online > MOST_THREADS ? MOST_THREADS : (int)online;
    }
    return asked < 1 || asked > MOST_THREADS ? 0 : asked;
}

int saevit_start_thread(pthread_t *thread, void *(*work)(void *), void *argument) {
    const int faults[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP}; /* of the thread itself: for crash reporters */
    sigset_t others, before;
    sigfillset(&others);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(&others, faults[i]);
    pthread_sigmask(SIG_SETMASK, &others, &before);
    const int failed = pthread_create(thread, NULL, work, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return !failed;
}

/* The processor -------------------------------------------------------- */

#if defined(__linux__) && defined(__aarch64__)

/* Names as /proc/cpuinfo has them, and the kernel's bits for them. An emulator need not fake that file. */
static int has_feature(const char *name) {
    static const struct {
        const char *name;
        int word, bit;
    } known[] = {
        {"fp", 0, 0},    {"asimd", 0, 1},    {"aes", 0, 3},       {"pmull", 0, 4},   {"sha1", 0, 5},   {"sha2", 0, 6},
        {"crc32", 0, 7}, {"atomics", 0, 8},  {"fphp", 0, 9},      {"asimdhp", 0, 10}, {"asimdrdm", 0, 12},
        {"jscvt", 0, 13}, {"fcma", 0, 14},
        {"lrcpc", 0, 15}, {"asimddp", 0, 20}, {"sve", 0, 22},     {"asimdfhm", 0, 23}, {"sve2", 1, 1},  {"svei8mm", 1, 9},
        {"svebf16", 1, 12}, {"i8mm", 1, 13}, {"bf16", 1, 14},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(known[i].name, name))
            return (int)(getauxval(known[i].word ? AT_HWCAP2 : AT_HWCAP) >> known[i].bit & 1);
    return 1;
}

#elif defined(__linux__) && defined(__x86_64__)

static int has_feature(const char *name) {
    static const char *const separators = " \t\n";
    char *line = NULL;
    size_t room = 0;
    int found = 0, seen = 0;
    FILE *file = fopen("/proc/cpuinfo", "r");
    if (!file) return 1;
    while (!seen && getline(&line, &room, file) > 0) {
        if (strncmp(line, "flags", 5)) continue;
        seen = 1;
        char *rest = NULL;
        for (char *word = strtok_r(line, separators, &rest); word && !found; word = strtok_r(NULL, separators, &rest))
            found = !strcmp(word, name);
    }
    free(line);
    fclose(file);
    return found || !seen;
}

#else

static int has_feature(const char *name) {
    (void)name;
    return 1; /* no way to tell */
}

#endif

saevit_status saevit_check_machine(void) {
    if (strcmp(saevit_needed_arch, ARCH))
        return saevit_fail(SAEVIT_WRONG_MACHINE, "the model was built for %s, and this program runs on %s",
                           saevit_needed_arch, ARCH);
    for (const char *const *name = saevit_needed_features; *name; name++)
        if (!has_feature(*name))
            return saevit_fail(SAEVIT_WRONG_MACHINE, "the model was built for %s and needs the processor feature '%s', "
                               "which this machine lacks", saevit_model.target, *name);
    return SAEVIT_OK;
}

/* What the caller gives -------------------------------------------------- */

static saevit_status check_inputs(const saevit_input *inputs, size_t input_count, size_t *rows) {
    const saevit_description *model = &saevit_model;
    if (!inputs || input_count != model->input_count)
        return saevit_fail(SAEVIT_BAD_ARGUMENT, "%zu inputs are given, and the model has %zu", inputs ? input_count : 0,
                           model->input_count);
    *rows = model->batch_count ? inputs[0].size / model->inputs[0].row : 1;
    for (size_t i = 0; i < input_count; i++) {
        const saevit_tensor *wanted = &model->inputs[i];
        if (!inputs[i].data) return saevit_fail(SAEVIT_BAD_ARGUMENT, "input '%s' is NULL", wanted->name);
        if (*rows && inputs[i].size == *rows * wanted->row) continue;
        if (model->batch_count)
            return saevit_fail(SAEVIT_BAD_ARGUMENT, "input '%s' has %zu bytes, and must have %zu for each of one picture "
                               "or more", wanted->name, inputs[i].size, wanted->row);
        return saevit_fail(SAEVIT_BAD_ARGUMENT, "the input has %zu bytes, and '%s' takes %zu", inputs[i].size,
                           wanted->name, wanted->size);
    }
    return SAEVIT_OK;
}

saevit_status saevit_check_buffers(const saevit_input *inputs, size_t input_count, const saevit_buffer *outputs,
                                   size_t output_count, size_t *rows) {
    const saevit_description *model = &saevit_model;
    const saevit_status status = check_inputs(inputs, input_count, rows);
    if (status) return status;
    if (!outputs || output_count != model->output_count)
        return saevit_fail(SAEVIT_BAD_ARGUMENT, "%zu outputs are given, and the model has %zu",
                           outputs ? output_count : 0, model->output_count);
    for (size_t i = 0; i < output_count; i++) {
        const size_t needed = *rows * model->outputs[i].row;
        if (!outputs[i].data)
            return saevit_fail(SAEVIT_BAD_ARGUMENT, "output '%s' is NULL", model->outputs[i].name);
        if (outputs[i].size != needed)
            return saevit_fail(SAEVIT_BAD_ARGUMENT, "output '%s' has room for %zu bytes, and needs %zu",
                               model->outputs[i].name, outputs[i].size, needed);
    }
    return SAEVIT_OK;
}

const void *saevit_rows_of(const call_part *part, size_t input) {
    return (const char *)part->inputs[input].data + part->first * saevit_model.inputs[input].row;
}

void saevit_stage(const call_part *part, size_t input, void *place) {
    const size_t row = saevit_model.inputs[input].row, lacking = saevit_entries[part->entry].rows - part->rows;
    memcpy(place, saevit_rows_of(part, input), part->rows * row);
    memset((char *)place + part->rows * row, 0, lacking * row);
}
