/* Reads a PNG as 8-bit RGB: 8 bits a channel, not interlaced; grey, colour or palette; what is transparent on white. */
#ifndef PNG_H
#define PNG_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    int width, height;
    uint8_t *rgb; /* to be freed */
} png_image;

/* 0, or why the bytes are no picture that this reader knows. */
const char *png_read(const uint8_t *data, size_t size, png_image *image);

#ifdef __cplusplus
}
#endif

#endif
