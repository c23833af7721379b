/* A picture in, answers out: what both flavours do before they run. */
#include <stdlib.h>

#include "internal.h"

saevit_status saevit_run_image(saevit *model, const uint8_t *rgb, int width, int height, const saevit_buffer *outputs,
                               size_t output_count) {
    saevit_status status = SAEVIT_OK;
    void *input = saevit_load_image(rgb, width, height, &status);
    if (!input) return status;
    status = saevit_run(model, input, saevit_model.input.size, outputs, output_count);
    free(input);
    return status;
}
