/* Counts what the static flavour allocates while it runs in its caller's memory: this allocator is the program's. */
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "saevit.h"

enum { GRAIN = 64, ROOM = 1 << 24, TIMES = 5 };

static _Alignas(GRAIN) unsigned char heap[ROOM], workspace[ROOM];
static atomic_size_t used;
static atomic_int asked;

static void *give(size_t size) {
    asked++;
    const size_t whole = (size + 2 * GRAIN - 1) / GRAIN * GRAIN; /* its size lies before it, for realloc */
    unsigned char *block = heap + atomic_fetch_add(&used, whole);
    if (block + whole > heap + ROOM) return NULL;
    memcpy(block, &size, sizeof size);
    return block + GRAIN;
}

void *malloc(size_t size) { return give(size); }
void *calloc(size_t count, size_t size) { return give(count * size); }
void free(void *memory) { (void)memory; }

void *realloc(void *memory, size_t size) {
    size_t before = 0;
    void *moved = give(size);
    if (memory) memcpy(&before, (unsigned char *)memory - GRAIN, sizeof before);
    return moved && memory ? memcpy(moved, memory, before < size ? before : size) : moved;
}

int posix_memalign(void **memory, size_t alignment, size_t size) {
    *memory = alignment <= GRAIN ? give(size) : NULL;
    return *memory ? 0 : ENOMEM;
}

int main(void) {
    static _Alignas(GRAIN) float input[1 << 16];
    static unsigned char output[1 << 16];
    const saevit_description *about = saevit_describe();
    saevit_options options = {.threads = 2, .workspace = workspace, .workspace_size = sizeof workspace};
    saevit_buffer scores = {output, about->outputs[0].size};
    saevit *model = NULL;
    if (saevit_workspace_size(2) > sizeof workspace || saevit_open(&options, &model)) return 1;
    const int before = asked;
    for (int i = 0; i < TIMES; i++) {
        input[i] = (float)i;
        const size_t off = i % 2 ? 4 : 0; /* a misaligned input is copied, into memory that is there */
        if (saevit_run(model, (unsigned char *)input + off, about->inputs[0].size, &scores, 1)) return 1;
    }
    const int allocated = asked - before;
    saevit_close(model);
    printf("%d allocations\n", allocated);
    return 0;
}
