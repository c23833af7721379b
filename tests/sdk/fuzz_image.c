/* Whatever the bytes: the PNG reader reads or refuses them, and any picture of any size becomes class scores. */
#include <math.h>
#include <stdlib.h>

#include "png.h"
#include "saevit.h"

enum { SMALL = 1 << 20 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void classify(const uint8_t *rgb, int width, int height) {
    static saevit *model;
    static const saevit_options options = {.threads = 1};
    static saevit_buffer scores;
    if (!model) {
        if (saevit_open(&options, &model)) abort();
        scores.size = saevit_describe()->outputs[0].size;
        scores.data = malloc(scores.size);
    }
    if (saevit_run_image(model, rgb, width, height, &scores, 1)) abort();
    for (size_t i = 0; i < scores.size / sizeof(float); i++)
        if (!isfinite(((float *)scores.data)[i])) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    png_image image;
    if (!png_read(data, size, &image)) {
        if ((int64_t)image.width * image.height <= SMALL) classify(image.rgb, image.width, image.height);
        free(image.rgb);
    }
    if (size < 4) return 0;
    /* The first two bytes are a width; what follows gives as many rows as there are. */
    const int width = 1 + (data[0] | data[1] << 8) % 2000;
    const size_t height = (size - 2) / ((size_t)width * 3);
    if (height) {
        uint8_t *rgb = malloc((size_t)width * height * 3);
        for (size_t i = 0; i < (size_t)width * height * 3; i++) rgb[i] = data[2 + i];
        classify(rgb, width, (int)height);
        free(rgb);
    }
    return 0;
}
