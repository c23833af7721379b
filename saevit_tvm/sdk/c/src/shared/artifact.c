/* The seal is at the end: [library][manifest][sha256 of both][length of the manifest, u64 LE]["SAEVIT1\n"]. */
#define _GNU_SOURCE
#include "artifact.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "sha256.h"

enum { DIGEST = 32, LENGTH = 8, MAGIC = 8, TAIL = DIGEST + LENGTH + MAGIC, ELF_HEADER = 20 };

#if defined(__x86_64__)
enum { THIS_MACHINE = 62 };
#elif defined(__aarch64__)
enum { THIS_MACHINE = 183 };
#elif defined(__riscv)
enum { THIS_MACHINE = 243 };
#else
enum { THIS_MACHINE = -1 };
#endif

static int reads(FILE *file, long where, int from, void *into, size_t size) {
    return !fseek(file, where, from) && fread(into, 1, size, file) == size;
}

/* Whether the first `count` bytes could be read; then their digest. */
static int digest_of(FILE *file, uint64_t count, uint8_t digest[DIGEST]) {
    uint8_t part[1 << 14];
    sha256 hash;
    saevit_sha256_begin(&hash);
    if (fseek(file, 0, SEEK_SET)) return 0;
    while (count) {
        const size_t size = count < sizeof part ? (size_t)count : sizeof part;
        if (fread(part, 1, size, file) != size) return 0;
        saevit_sha256_add(&hash, part, size);
        count -= size;
    }
    saevit_sha256_end(&hash, digest);
    return 1;
}

static saevit_status check(FILE *file, const char *path) {
    uint8_t head[ELF_HEADER], tail[TAIL], digest[DIGEST];
    const long size = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
    if (size < 0) return saevit_fail(SAEVIT_BAD_FILE, "cannot read '%s': it is no ordinary file", path);
    if (!reads(file, 0, SEEK_SET, head, sizeof head) || memcmp(head, "\177ELF", 4))
        return saevit_fail(SAEVIT_BAD_FILE, "'%s' is not a library: give the .so that saevit-tvm built", path);
    if (size < TAIL + ELF_HEADER || !reads(file, -TAIL, SEEK_END, tail, sizeof tail) ||
        memcmp(tail + DIGEST + LENGTH, "SAEVIT1\n", MAGIC))
        return saevit_fail(SAEVIT_BAD_FILE, "'%s' carries no seal: it is cut short, or another program built it", path);
    if ((head[18] | head[19] << 8) != THIS_MACHINE)
        return saevit_fail(SAEVIT_WRONG_MACHINE, "'%s' is built for another processor (ELF machine %d)", path,
                           head[18] | head[19] << 8);
    if (!digest_of(file, (uint64_t)size - TAIL, digest) || memcmp(digest, tail, DIGEST))
        return saevit_fail(SAEVIT_BAD_FILE, "'%s' is damaged: its bytes are not those that were built", path);
    if (memcmp(digest, saevit_artifact_digest, DIGEST))
        return saevit_fail(SAEVIT_BAD_FILE, "'%s' is not the artifact that this SDK was made for: make the SDK again",
                           path);
    return SAEVIT_OK;
}

saevit_status saevit_check_artifact(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return saevit_fail(SAEVIT_BAD_FILE, "cannot open '%s': %s", path, strerror(errno));
    saevit_status status = check(file, path);
    fclose(file);
    return status;
}
