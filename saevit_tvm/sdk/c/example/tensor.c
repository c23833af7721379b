/* Raw numbers in, raw numbers out:  tensor INPUT OUTPUT [THREADS [TIMES [ARTIFACT.so]]]
 *
 * INPUT holds the inputs of an inference one after the other, as NumPy's tofile writes them, or those of several
 * inferences; OUTPUT gets all outputs of each. A model that takes any number of pictures takes all that INPUT holds at
 * once: those of the first input, then those of the next. With TIMES the inputs are run so many times, and the
 * milliseconds of one inference are printed. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "saevit.h"

enum { MOST = 16 };

static double now(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

/* The whole of a file; NULL if it cannot be read. */
static char *read_all(FILE *file, size_t *size) {
    const long length = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
    char *data = length < 0 ? NULL : (char *)malloc((size_t)length + 1);
    rewind(file);
    *size = data ? fread(data, 1, (size_t)length, file) : 0;
    return data;
}

/* One inference on so many pictures (1 where the model takes no number of them), whose inputs begin at `data`. */
static saevit_status run_one(saevit *model, const char *data, size_t pictures, FILE *out, long times) {
    const saevit_description *about = saevit_describe();
    saevit_input inputs[MOST];
    saevit_buffer outputs[MOST];
    for (size_t i = 0; i < about->input_count; i++) {
        inputs[i].data = data;
        inputs[i].size = pictures * about->inputs[i].row;
        data += inputs[i].size;
    }
    for (size_t i = 0; i < about->output_count; i++) {
        outputs[i].size = pictures * about->outputs[i].row;
        outputs[i].data = malloc(outputs[i].size);
    }
    saevit_status status = saevit_run_inputs(model, inputs, about->input_count, outputs, about->output_count);
    const double start = now();
    for (long t = 0; !status && t < times; t++)
        status = saevit_run_inputs(model, inputs, about->input_count, outputs, about->output_count);
    if (times) printf("%.4f ms\n", (now() - start) / (double)times);
    for (size_t i = 0; i < about->output_count; i++) {
        if (!status) fwrite(outputs[i].data, 1, outputs[i].size, out);
        free(outputs[i].data);
    }
    return status;
}

static saevit_status run_all(saevit *model, FILE *in, FILE *out, long times) {
    const saevit_description *about = saevit_describe();
    if (about->input_count > MOST || about->output_count > MOST) return SAEVIT_UNSUPPORTED;
    size_t size = 0, row = 0;
    for (size_t i = 0; i < about->input_count; i++) row += about->inputs[i].row;
    char *data = read_all(in, &size);
    const size_t rows = size / row, at_once = about->batch_count ? rows : 1;
    saevit_status status = SAEVIT_OK;
    for (size_t first = 0; !status && first < rows; first += at_once)
        status = run_one(model, data + first * row, at_once, out, times);
    free(data);
    return status;
}

int main(int argc, char **argv) {
    if (argc < 3) {
        fprintf(stderr, "usage: %s INPUT OUTPUT [THREADS [TIMES [ARTIFACT.so]]]\n", argv[0]);
        return 2;
    }
    FILE *in = fopen(argv[1], "rb"), *out = fopen(argv[2], "wb");
    if (!in || !out) {
        perror(in ? argv[2] : argv[1]);
        return 1;
    }
    saevit_options options = {0};
    options.threads = argc > 3 ? atoi(argv[3]) : 1;
    options.artifact = argc > 5 ? argv[5] : NULL;
    saevit *model = NULL;
    saevit_status status = saevit_open(&options, &model);
    if (!status) status = run_all(model, in, out, argc > 4 ? atol(argv[4]) : 0);
    if (status) fprintf(stderr, "%s\n", saevit_last_error());
    saevit_close(model);
    fclose(in);
    return fclose(out) || status ? 1 : 0;
}
