/* SHA-256 as FIPS 180-4 defines it: the seal on an artifact. */
#ifndef SAEVIT_SHA256_H
#define SAEVIT_SHA256_H

#include "../internal.h"

typedef struct {
    uint32_t state[8];
    uint64_t length;
    uint8_t block[64];
} sha256;

HIDDEN void saevit_sha256_begin(sha256 *hash);
HIDDEN void saevit_sha256_add(sha256 *hash, const uint8_t *data, size_t size);
HIDDEN void saevit_sha256_end(sha256 *hash, uint8_t digest[32]);

#endif
