/* From a picture to an input, as the artifact's manifest says it.
 *
 * Resizing widens its filter when it shrinks, works across and down one after the other, and rounds to 8 bits after
 * each, with weights of 22 bits: what Pillow does, so that C and Python see the same pixels. (Older versions of
 * Pillow always work across first: there a tall picture may differ by one level in 255.)
 */
#define _GNU_SOURCE
#include "internal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { CHANNELS = 3, WEIGHT_BITS = 32 - 8 - 2, LARGEST_SIDE = 1 << 20 };
static const int64_t MOST_PIXELS = 80000000;

/* The part of a source axis that is kept. */
typedef struct {
    float start, end;
} span;

/* For every pixel of the result: which source pixels weigh in, and how much. */
typedef struct {
    int taps;
    int *first, *count;
    int32_t *weights;
} axis;

static double triangle(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double cubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
    return 0.0;
}

static void free_axis(axis *a) {
    free(a->first);
    free(a->weights);
}

static int make_axis(axis *a, int source, span kept, int size, resize_method method) {
    double (*filter)(double) = method == RESIZE_BICUBIC ? cubic : triangle;
    const double scale = (double)(kept.end - kept.start) / size;
    const double stretch = scale < 1.0 ? 1.0 : scale;
    const double reach = (method == RESIZE_BICUBIC ? 2.0 : 1.0) * stretch;
    a->taps = (int)ceil(reach) * 2 + 1;
    a->first = malloc(2 * (size_t)size * sizeof *a->first);
    a->weights = malloc((size_t)size * (size_t)a->taps * sizeof *a->weights);
    double *exact = malloc((size_t)a->taps * sizeof *exact);
    if (!a->first || !a->weights || !exact) {
        free(exact);
        return 0;
    }
    a->count = a->first + size;
    for (int i = 0; i < size; i++) {
        const double center = (double)kept.start + (i + 0.5) * scale;
        int first = (int)(center - reach + 0.5), end = (int)(center + reach + 0.5);
        first = first < 0 ? 0 : first;
        end = end > source ? source : end;
        double sum = 0;
        for (int t = 0; t < end - first; t++) {
            exact[t] = filter((t + first - center + 0.5) * (1.0 / stretch));
            sum += exact[t];
        }
        for (int t = 0; t < end - first; t++) {
            const double weight = (sum != 0.0 ? exact[t] / sum : exact[t]) * (1 << WEIGHT_BITS);
            a->weights[(size_t)i * (size_t)a->taps + (size_t)t] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        a->first[i] = first;
        a->count[i] = end - first;
    }
    free(exact);
    return 1;
}

static uint8_t rounded(int64_t sum) {
    sum >>= WEIGHT_BITS;
    return (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

/* One pixel of the result: `step` bytes lie between the source pixels that weigh in. */
static void mix(const axis *a, int i, const uint8_t *source, size_t step, uint8_t *out) {
    const int32_t *weights = a->weights + (size_t)i * (size_t)a->taps;
    source += (size_t)a->first[i] * step;
    for (int c = 0; c < CHANNELS; c++) {
        int64_t sum = 1 << (WEIGHT_BITS - 1);
        for (int t = 0; t < a->count[i]; t++) sum += (int64_t)source[(size_t)t * step + (size_t)c] * weights[t];
        out[c] = rounded(sum);
    }
}

static void resize_across(const axis *x, const uint8_t *source, int width, int lines, uint8_t *out) {
    const int w = saevit_model.image_width;
    for (int line = 0; line < lines; line++, source += (size_t)width * CHANNELS)
        for (int i = 0; i < w; i++, out += CHANNELS) mix(x, i, source, CHANNELS, out);
}

static void resize_down(const axis *y, const uint8_t *source, int width, uint8_t *out) {
    const size_t row = (size_t)width * CHANNELS;
    for (int j = 0; j < saevit_model.image_height; j++)
        for (size_t i = 0; i < row; i += CHANNELS, out += CHANNELS) mix(y, j, source + i, row, out);
}

/* Which way goes first shows in the last bit. A tall picture is worth shortening first. */
static int is_tall(int width, int height) {
    const int narrower = width - saevit_model.image_width, shorter = height - saevit_model.image_height;
    return shorter > 0 && shorter > 2 * narrower;
}

static int resize_smooth(const uint8_t *rgb, int width, int height, span across, span down, resize_method method,
                         uint8_t *out) {
    const int w = saevit_model.image_width, h = saevit_model.image_height, tall = is_tall(width, height);
    axis x = {0}, y = {0};
    uint8_t *half_done = NULL;
    if (make_axis(&x, width, across, w, method) && make_axis(&y, height, down, h, method)) {
        const int first = y.first[0], lines = y.first[h - 1] + y.count[h - 1] - first;
        const uint8_t *start = rgb + (size_t)first * (size_t)width * CHANNELS;
        half_done = malloc((tall ? (size_t)width * (size_t)h : (size_t)w * (size_t)lines) * CHANNELS);
        for (int j = 0; j < h; j++) y.first[j] -= first;
        if (half_done && tall) {
            resize_down(&y, start, width, half_done);
            resize_across(&x, half_done, width, h, out);
        } else if (half_done) {
            resize_across(&x, start, width, lines, half_done);
            resize_down(&y, half_done, w, out);
        }
    }
    const int done = half_done != NULL;
    free(half_done);
    free_axis(&x);
    free_axis(&y);
    return done;
}

/* The source pixel under the middle of each pixel of the result; positions add up as Pillow adds them. */
static void resize_nearest(const uint8_t *rgb, int width, int height, span across, span down, uint8_t *out) {
    const int w = saevit_model.image_width, h = saevit_model.image_height;
    const double x_step = ((double)across.end - (double)across.start) / w;
    const double y_step = ((double)down.end - (double)down.start) / h;
    double y = (double)down.start + y_step * 0.5;
    for (int j = 0; j < h; j++, y += y_step) {
        const int line = (int)y < height ? (int)y : height - 1;
        double x = (double)across.start + x_step * 0.5;
        for (int i = 0; i < w; i++, x += x_step) {
            const int column = (int)x < width ? (int)x : width - 1;
            memcpy(out, rgb + ((size_t)line * (size_t)width + (size_t)column) * CHANNELS, CHANNELS);
            out += CHANNELS;
        }
    }
}

/* Where the middle of a resized side begins and ends in the side as it was. */
static span kept_of(int source, int64_t resized, int size) {
    int64_t first = (resized - size) / 2;
    if ((resized - size) % 2) first += first % 2; /* a half goes to the even one, as Python rounds */
    return (span){(float)((double)(first * source) / (double)resized),
                  (float)((double)((first + size) * source) / (double)resized)};
}

/* The middle of the picture as it would be if its shorter side, or both, were resized to the enlarged size. */
static void choose_middle(int width, int height, span *across, span *down) {
    int64_t wide = saevit_preprocessing.enlarged_width, tall = saevit_preprocessing.enlarged_height;
    if (saevit_preprocessing.crop_center) {
        if (width * tall >= height * wide)
            wide = width * tall / height;
        else
            tall = height * wide / width;
    }
    *across = kept_of(width, wide, saevit_model.image_width);
    *down = kept_of(height, tall, saevit_model.image_height);
}

/* The largest part in the middle that has the proportions of the model's input. */
static void choose_spans(int width, int height, span *across, span *down) {
    double w = width, h = height, left = 0, top = 0;
    if (saevit_preprocessing.crop_center) {
        const double wanted = (double)saevit_model.image_width / saevit_model.image_height;
        const double given = w / h;
        if (given > wanted) w = wanted * h;
        if (given < wanted) h = w / wanted;
        left = (width - w) * 0.5;
        top = (height - h) * 0.5;
    }
    *across = (span){(float)left, (float)(left + w)};
    *down = (span){(float)top, (float)(top + h)};
}

/* Floats, normalised, in planes or as the pixels lie; each step rounds on its own, as NumPy's do. */
static void normalise(const uint8_t *pixels, float *input) {
    const preprocessing *how = &saevit_preprocessing;
    const size_t area = (size_t)saevit_model.image_width * (size_t)saevit_model.image_height;
    for (size_t c = 0; c < CHANNELS; c++) {
        float value[256];
        for (int level = 0; level < 256; level++) {
            volatile float scaled = (float)level * how->scale;
            value[level] = (scaled - how->mean[c]) / how->deviation[c];
        }
        const size_t start = how->channels_last ? c : c * area, step = how->channels_last ? CHANNELS : 1;
        for (size_t i = 0; i < area; i++) input[start + i * step] = value[pixels[i * CHANNELS + c]];
    }
}

void *saevit_load_image(const uint8_t *rgb, int width, int height, saevit_status *status) {
    const size_t area = (size_t)saevit_model.image_width * (size_t)saevit_model.image_height;
    const saevit_tensor *input = &saevit_model.inputs[0];
    const int frame = !strcmp(input->dtype, "uint8"); /* which the model normalises itself */
    *status = SAEVIT_OK;
    if (saevit_model.input_count != 1 || (!frame && strcmp(input->dtype, "float32")) ||
        input->row != area * CHANNELS * (frame ? sizeof(uint8_t) : sizeof(float)))
        *status = saevit_fail(SAEVIT_UNSUPPORTED, "the model does not take one RGB picture: use saevit_run");
    else if (!rgb)
        *status = saevit_fail(SAEVIT_BAD_ARGUMENT, "the picture is NULL");
    else if (width < 1 || height < 1 || width > LARGEST_SIDE || height > LARGEST_SIDE ||
             (int64_t)width * height > MOST_PIXELS)
        *status = saevit_fail(SAEVIT_BAD_ARGUMENT, "a picture of %d x %d pixels is impossible", width, height);
    if (*status) return NULL;

    span across, down;
    if (saevit_preprocessing.enlarged_width)
        choose_middle(width, height, &across, &down);
    else
        choose_spans(width, height, &across, &down);
    void *values = NULL;
    int done = !posix_memalign(&values, ALIGNMENT, input->row);
    uint8_t *pixels = frame ? values : malloc(area * CHANNELS);
    done = done && pixels;
    if (done && saevit_preprocessing.resize == RESIZE_NEAREST)
        resize_nearest(rgb, width, height, across, down, pixels);
    else if (done)
        done = resize_smooth(rgb, width, height, across, down, saevit_preprocessing.resize, pixels);
    if (done && !frame) normalise(pixels, values);
    if (!frame) free(pixels);
    if (done) return values;
    free(values);
    *status = saevit_fail(SAEVIT_NO_MEMORY, "there is no memory to resize a picture of %d x %d", width, height);
    return NULL;
}
