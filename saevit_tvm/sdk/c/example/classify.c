/* Says what is in a picture:  classify PICTURE.png
 *
 * With the shared flavour:    classify PICTURE.png lib/model.so */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "png.h"
#include "saevit.h"

enum { SHOWN = 5 };

static uint8_t *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    uint8_t *data = NULL;
    long length = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
    if (length > 0 && !fseek(file, 0, SEEK_SET)) data = (uint8_t *)malloc((size_t)length);
    *size = data ? fread(data, 1, (size_t)length, file) : 0;
    fclose(file);
    return data;
}

static int read_picture(const char *path, png_image *image) {
    size_t size = 0;
    uint8_t *data = read_file(path, &size);
    const char *fault = data ? png_read(data, size, image) : "it cannot be read";
    if (fault) fprintf(stderr, "%s: %s\n", path, fault);
    free(data);
    return !fault;
}

/* The likeliest classes first, as probabilities. NaN or infinity among the scores is no answer: nothing is printed, and 0 given. */
static int print_best(float *scores, size_t classes, const char *const *labels) {
    double sum = 0, top = scores[0];
    for (size_t i = 0; i < classes; i++) top = scores[i] > top ? scores[i] : top;
    for (size_t i = 0; i < classes; i++) sum += exp(scores[i] - top);
    if (!isfinite(sum)) return 0;
    for (size_t shown = 0; shown < SHOWN && shown < classes; shown++) {
        size_t best = 0;
        for (size_t i = 1; i < classes; i++)
            if (scores[i] > scores[best]) best = i;
        const double probability = 100 * exp(scores[best] - top) / sum;
        if (labels)
            printf("%5.1f%%  %s\n", probability, labels[best]);
        else
            printf("%5.1f%%  class %zu\n", probability, best);
        scores[best] = -INFINITY;
    }
    return 1;
}

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: %s PICTURE.png [ARTIFACT.so]\n", argv[0]);
        return 2;
    }
    png_image image;
    if (!read_picture(argv[1], &image)) return 1;

    const saevit_description *about = saevit_describe();
    if (about->output_count != 1 || strcmp(about->outputs[0].dtype, "float32")) {
        fprintf(stderr, "the model gives no class scores: see tensor.c\n");
        return 1;
    }
    saevit_options options = {0};
    options.artifact = argc > 2 ? argv[2] : NULL;
    saevit *model = NULL;
    saevit_buffer scores = {malloc(about->outputs[0].row), about->outputs[0].row};
    saevit_status status = saevit_open(&options, &model);
    if (!status) status = saevit_run_image(model, image.rgb, image.width, image.height, &scores, 1);
    int answered = 0;
    if (status)
        fprintf(stderr, "%s\n", saevit_last_error());
    else if (!(answered = print_best((float *)scores.data, scores.size / sizeof(float), about->labels)))
        fprintf(stderr, "the model's answer is not a number (NaN or infinity): check its weights, and the picture\n");
    saevit_close(model);
    free(scores.data);
    free(image.rgb);
    return answered ? 0 : 1;
}
