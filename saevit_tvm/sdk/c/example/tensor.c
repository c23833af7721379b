/* Raw numbers in, raw numbers out:  tensor INPUT OUTPUT [THREADS [TIMES [ARTIFACT.so]]]
 *
 * INPUT holds one input or several in a row, as NumPy's tofile writes them; OUTPUT gets all outputs of each. With
 * TIMES the inputs are run so many times, and the milliseconds of one inference are printed. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "saevit.h"

enum { MOST_OUTPUTS = 16 };

static double now(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static saevit_status run_all(saevit *model, FILE *in, FILE *out, long times) {
    const saevit_description *about = saevit_describe();
    saevit_buffer outputs[MOST_OUTPUTS];
    void *input = malloc(about->input.size);
    size_t count = about->output_count;
    if (count > MOST_OUTPUTS) return SAEVIT_UNSUPPORTED;
    for (size_t i = 0; i < count; i++) {
        outputs[i].size = about->outputs[i].size;
        outputs[i].data = malloc(outputs[i].size);
    }
    saevit_status status = SAEVIT_OK;
    while (!status && fread(input, about->input.size, 1, in) == 1) {
        status = saevit_run(model, input, about->input.size, outputs, count);
        const double start = now();
        for (long t = 0; !status && t < times; t++)
            status = saevit_run(model, input, about->input.size, outputs, count);
        if (times) printf("%.4f ms\n", (now() - start) / (double)times);
        for (size_t i = 0; !status && i < count; i++) fwrite(outputs[i].data, 1, outputs[i].size, out);
    }
    for (size_t i = 0; i < count; i++) free(outputs[i].data);
    free(input);
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
