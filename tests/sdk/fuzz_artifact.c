/* Whatever file it is given, opening says a status and a sentence. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "saevit.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char path[64];
    saevit *model = NULL;
    saevit_options options = {0};
    const int file = memfd_create("artifact", 0);
    if (file < 0 || write(file, data, size) != (ssize_t)size) abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    options.threads = 1;
    options.artifact = path;
    options.runtime = "/nonexistent";
    const saevit_status status = saevit_open(&options, &model);
    if (status == SAEVIT_OK || model || !saevit_last_error()[0]) abort();
    close(file);
    return 0;
}
