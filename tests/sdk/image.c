/* What a picture becomes before the model sees it: floats on stdout for WIDTH HEIGHT and RGB bytes on stdin. */
#include <stdio.h>
#include <stdlib.h>

#include "internal.h"

const char saevit_flavour[] = "none";

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    const int width = atoi(argv[1]), height = atoi(argv[2]);
    const size_t size = (size_t)width * (size_t)height * 3;
    uint8_t *rgb = malloc(size);
    saevit_status status;
    void *input = fread(rgb, 1, size, stdin) == size ? saevit_load_image(rgb, width, height, &status) : NULL;
    if (!input) return 1;
    fwrite(input, 1, saevit_model.inputs[0].size, stdout);
    free(input);
    free(rgb);
    return 0;
}
