/* Runs many inferences and says how much memory the process had after a tenth of them and at the end, in pages. */
#include <stdio.h>
#include <stdlib.h>

#include "saevit.h"

static long pages(void) {
    long size = 0, resident = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file || fscanf(file, "%ld %ld", &size, &resident) != 2) abort();
    fclose(file);
    return resident;
}

int main(int argc, char **argv) {
    const long times = argc > 1 ? atol(argv[1]) : 1;
    const saevit_description *about = saevit_describe();
    saevit_options options = {0};
    options.threads = argc > 2 ? atoi(argv[2]) : 1;
    options.artifact = argc > 3 ? argv[3] : NULL;
    saevit *model = NULL;
    saevit_status status = saevit_open(&options, &model);
    float *input = calloc(1, about->inputs[0].size);
    saevit_buffer output = {malloc(about->outputs[0].size), about->outputs[0].size};
    long early = 0;
    for (long i = 0; !status && i < times; i++) {
        input[i % (long)(about->inputs[0].size / sizeof(float))] = (float)(i % 7);
        status = saevit_run(model, input, about->inputs[0].size, &output, 1);
        if (i == times / 10) early = pages();
    }
    if (status) fprintf(stderr, "%s\n", saevit_last_error());
    printf("%ld %ld\n", early, pages());
    saevit_close(model);
    free(input);
    free(output.data);
    return status != SAEVIT_OK;
}
