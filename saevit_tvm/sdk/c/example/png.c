/* A PNG is a zlib stream cut into chunks; RFC 1950, RFC 1951 and the PNG specification say how. */
#include "png.h"

#include <stdlib.h>
#include <string.h>

/* Inflate ------------------------------------------------------------------ */

enum { MOST_BITS = 15, LITERALS = 288, DISTANCES = 30 };

typedef struct {
    const uint8_t *data;
    size_t size, at;
    uint32_t bits;
    int bit_count, failed;
    uint8_t *out;
    size_t room, made;
} stream;

/* How many codes there are of each length, and their symbols in order. */
typedef struct {
    uint16_t count[MOST_BITS + 1], symbol[LITERALS];
} code;

static unsigned take_bits(stream *s, int count) {
    while (s->bit_count < count) {
        if (s->at == s->size) {
            s->failed = 1;
            return 0;
        }
        s->bits |= (uint32_t)s->data[s->at++] << s->bit_count;
        s->bit_count += 8;
    }
    const unsigned value = s->bits & ((1u << count) - 1);
    s->bits >>= count;
    s->bit_count -= count;
    return value;
}

static void put(stream *s, uint8_t byte) {
    if (s->made == s->room)
        s->failed = 1;
    else
        s->out[s->made++] = byte;
}

static void make_code(code *c, const uint8_t *lengths, int count) {
    uint16_t next[MOST_BITS + 2] = {0};
    memset(c, 0, sizeof *c);
    for (int i = 0; i < count; i++) c->count[lengths[i]]++;
    c->count[0] = 0;
    for (int length = 1; length <= MOST_BITS; length++) next[length + 1] = (uint16_t)(next[length] + c->count[length]);
    for (int i = 0; i < count; i++)
        if (lengths[i]) c->symbol[next[lengths[i]]++] = (uint16_t)i;
}

static unsigned take_symbol(stream *s, const code *c) {
    int value = 0, first = 0, index = 0;
    for (int length = 1; length <= MOST_BITS && !s->failed; length++) {
        value |= (int)take_bits(s, 1);
        if (value - first < c->count[length]) return c->symbol[index + value - first];
        index += c->count[length];
        first = (first + c->count[length]) << 1;
        value <<= 1;
    }
    s->failed = 1;
    return 0;
}

/* Lengths and distances of repeats: where each symbol's range begins, and how many bits say where in it. */
static void copy_back(stream *s, unsigned symbol, const code *distances) {
    static const uint16_t length_base[] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                           31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
    static const uint8_t length_bits[] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    static const uint16_t distance_base[] = {1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
                                             193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
    if (symbol >= sizeof length_bits) {
        s->failed = 1;
        return;
    }
    unsigned length = length_base[symbol] + take_bits(s, length_bits[symbol]);
    const unsigned d = take_symbol(s, distances);
    if (d >= DISTANCES) {
        s->failed = 1;
        return;
    }
    const size_t distance = distance_base[d] + take_bits(s, d < 2 ? 0 : (int)d / 2 - 1);
    if (distance > s->made) s->failed = 1;
    while (length-- && !s->failed) put(s, s->out[s->made - distance]);
}

static void inflate_codes(stream *s, const code *literals, const code *distances) {
    while (!s->failed) {
        const unsigned symbol = take_symbol(s, literals);
        if (s->failed || symbol == 256) return;
        if (symbol < 256)
            put(s, (uint8_t)symbol);
        else
            copy_back(s, symbol - 257, distances);
    }
}

static void inflate_fixed(stream *s) {
    uint8_t lengths[LITERALS];
    code literals, distances;
    for (int i = 0; i < LITERALS; i++) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
    make_code(&literals, lengths, LITERALS);
    memset(lengths, 5, DISTANCES);
    make_code(&distances, lengths, DISTANCES);
    inflate_codes(s, &literals, &distances);
}

static void inflate_dynamic(stream *s) {
    static const uint8_t order[] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    uint8_t lengths[LITERALS + 32] = {0};
    code literals, distances;
    const int literal_count = 257 + (int)take_bits(s, 5), distance_count = 1 + (int)take_bits(s, 5);
    const int order_count = 4 + (int)take_bits(s, 4);
    if (literal_count > 286 || distance_count > DISTANCES) s->failed = 1;
    for (int i = 0; i < order_count && !s->failed; i++) lengths[order[i]] = (uint8_t)take_bits(s, 3);
    make_code(&literals, lengths, 19);
    memset(lengths, 0, sizeof lengths);
    for (int i = 0; i < literal_count + distance_count && !s->failed;) {
        const unsigned symbol = take_symbol(s, &literals);
        const uint8_t value = symbol < 16 ? (uint8_t)symbol : symbol == 16 && i ? lengths[i - 1] : 0;
        int repeat = 1;
        if (symbol == 16) repeat = 3 + (int)take_bits(s, 2);
        if (symbol == 17) repeat = 3 + (int)take_bits(s, 3);
        if (symbol == 18) repeat = 11 + (int)take_bits(s, 7);
        if ((symbol == 16 && !i) || i + repeat > literal_count + distance_count) s->failed = 1;
        while (repeat-- && !s->failed) lengths[i++] = value;
    }
    make_code(&literals, lengths, literal_count);
    make_code(&distances, lengths + literal_count, distance_count);
    inflate_codes(s, &literals, &distances);
}

static void inflate_stored(stream *s) {
    s->bits = 0;
    s->bit_count = 0;
    unsigned length = take_bits(s, 16);
    if ((length ^ take_bits(s, 16)) != 0xffff) s->failed = 1;
    while (length-- && !s->failed) put(s, (uint8_t)take_bits(s, 8));
}

static int inflate(stream *s) {
    take_bits(s, 16); /* how it was compressed */
    for (unsigned last = 0; !last && !s->failed;) {
        last = take_bits(s, 1);
        switch (take_bits(s, 2)) {
            case 0: inflate_stored(s); break;
            case 1: inflate_fixed(s); break;
            case 2: inflate_dynamic(s); break;
            default: s->failed = 1;
        }
    }
    return !s->failed && s->made == s->room;
}

/* PNG ------------------------------------------------------------------------- */

enum { MOST_PIXELS = 80000000 };

typedef struct {
    int channels, color;
    uint8_t *stream; /* the zlib stream, its pieces joined */
    size_t size;
    uint8_t palette[256][4];
} parts;

static uint32_t big_endian(const uint8_t *b) {
    return (uint32_t)b[0] << 24 | (uint32_t)b[1] << 16 | (uint32_t)b[2] << 8 | b[3];
}

static const char *read_header(const uint8_t *data, uint32_t size, png_image *image, parts *p) {
    static const uint8_t channels[] = {1, 0, 3, 1, 2, 0, 4};
    if (size != 13) return "its header is damaged";
    const uint32_t width = big_endian(data), height = big_endian(data + 4);
    p->color = data[9];
    p->channels = p->color < 7 ? channels[p->color] : 0;
    if (!width || !height || width > MOST_PIXELS || height > MOST_PIXELS || (uint64_t)width * height > MOST_PIXELS)
        return "its size is impossible";
    if (data[8] != 8 || !p->channels || data[12]) return "only 8 bits a channel, not interlaced, can be read";
    image->width = (int)width;
    image->height = (int)height;
    return NULL;
}

static const char *read_chunks(const uint8_t *data, size_t size, png_image *image, parts *p) {
    for (size_t at = 8; at + 12 <= size;) {
        const uint32_t length = big_endian(data + at);
        const uint8_t *kind = data + at + 4, *body = kind + 4;
        if (length > size - at - 12) break;
        if (!memcmp(kind, "IHDR", 4)) {
            const char *fault = read_header(body, length, image, p);
            if (fault) return fault;
        } else if (!memcmp(kind, "PLTE", 4)) {
            for (uint32_t i = 0; i < length / 3 && i < 256; i++) memcpy(p->palette[i], body + 3 * i, 3);
        } else if (!memcmp(kind, "tRNS", 4) && p->color == 3) {
            for (uint32_t i = 0; i < length && i < 256; i++) p->palette[i][3] = body[i];
        } else if (!memcmp(kind, "IDAT", 4)) {
            memcpy(p->stream + p->size, body, length); /* never more than the file */
            p->size += length;
        } else if (!memcmp(kind, "IEND", 4)) {
            return p->channels && p->size ? NULL : "it holds no picture";
        }
        at += 12 + (size_t)length;
    }
    return "it is cut short";
}

static int nearest_of(int left, int up, int corner) {
    const int guess = left + up - corner;
    const int by_left = abs(guess - left), by_up = abs(guess - up), by_corner = abs(guess - corner);
    return by_left <= by_up && by_left <= by_corner ? left : by_up <= by_corner ? up : corner;
}

/* Every row says how its bytes differ from their neighbours. */
static int undo_filters(uint8_t *rows, size_t row, int height, size_t channels) {
    for (int y = 0; y < height; y++) {
        uint8_t *line = rows + (size_t)y * (row + 1) + 1;
        const uint8_t *above = y ? line - (row + 1) : line;
        const int filter = line[-1];
        if (filter > 4) return 0;
        for (size_t i = 0; i < row; i++) {
            const int left = i < channels ? 0 : line[i - channels], up = y ? above[i] : 0;
            const int corner = y && i >= channels ? above[i - channels] : 0;
            const int guess[] = {0, left, up, (left + up) / 2, nearest_of(left, up, corner)};
            line[i] = (uint8_t)(line[i] + guess[filter]);
        }
    }
    return 1;
}

static void to_rgb(const parts *p, const uint8_t *pixel, uint8_t *rgb) {
    if (p->color == 3) pixel = p->palette[*pixel];
    const int grey = p->color == 0 || p->color == 4;
    const int alpha = p->color == 3 || p->color == 6 ? pixel[3] : p->color == 4 ? pixel[1] : 255;
    for (int c = 0; c < 3; c++) rgb[c] = (uint8_t)((pixel[grey ? 0 : c] * alpha + 255 * (255 - alpha) + 127) / 255);
}

static const char *decode(png_image *image, parts *p) {
    const size_t channels = (size_t)p->channels, row = (size_t)image->width * channels;
    stream s = {.data = p->stream, .size = p->size, .room = (row + 1) * (size_t)image->height};
    /* Deflate shrinks no more than 1032-fold, so a small file cannot ask for much memory. */
    if (s.room / 1032 > p->size) return "it is cut short";
    s.out = malloc(s.room);
    image->rgb = malloc((size_t)image->width * (size_t)image->height * 3);
    const char *fault = NULL;
    if (!s.out || !image->rgb)
        fault = "there is no memory for it";
    else if (!inflate(&s) || !undo_filters(s.out, row, image->height, channels))
        fault = "its data are damaged";
    for (int y = 0; !fault && y < image->height; y++)
        for (int x = 0; x < image->width; x++)
            to_rgb(p, s.out + (size_t)y * (row + 1) + 1 + (size_t)x * channels,
                   image->rgb + ((size_t)y * (size_t)image->width + (size_t)x) * 3);
    free(s.out);
    return fault;
}

const char *png_read(const uint8_t *data, size_t size, png_image *image) {
    static const uint8_t signature[] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
    *image = (png_image){0, 0, NULL};
    if (size < sizeof signature || memcmp(data, signature, sizeof signature)) return "it is not a PNG";
    parts p = {0};
    for (int i = 0; i < 256; i++) p.palette[i][3] = 255;
    p.stream = malloc(size);
    const char *fault = p.stream ? read_chunks(data, size, image, &p) : "there is no memory for it";
    if (!fault) fault = decode(image, &p);
    free(p.stream);
    if (fault) {
        free(image->rgb);
        image->rgb = NULL;
    }
    return fault;
}
