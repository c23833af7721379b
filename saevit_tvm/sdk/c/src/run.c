/* What both flavours do before they compute: pictures become inputs, and any number of rows parts that fit. */
#include <stdlib.h>

#include "internal.h"

/* The smallest entry point that takes all the rows, or the largest. */
static size_t entry_for(size_t rows) {
    size_t entry = 0;
    while (entry + 1 < saevit_entry_count && saevit_entries[entry].rows < rows) entry++;
    return entry;
}

saevit_status saevit_run_inputs(saevit *model, const saevit_input *inputs, size_t input_count,
                                const saevit_buffer *outputs, size_t output_count) {
    size_t rows = 0;
    if (!saevit_is_open(model)) return saevit_fail(SAEVIT_BAD_ARGUMENT, "the model is not open");
    saevit_status status = saevit_check_buffers(inputs, input_count, outputs, output_count, &rows);
    if (status) return status;
    saevit_begin(model);
    for (size_t first = 0; !status && first < rows;) {
        const size_t left = rows - first, entry = entry_for(left), most = saevit_entries[entry].rows;
        const call_part part = {entry, first, left < most ? left : most, inputs, outputs};
        status = saevit_compute(model, &part);
        first += part.rows;
    }
    saevit_end(model);
    return status;
}

saevit_status saevit_run(saevit *model, const void *input, size_t input_size, const saevit_buffer *outputs,
                         size_t output_count) {
    const saevit_input one = {input, input_size};
    return saevit_run_inputs(model, &one, 1, outputs, output_count);
}

saevit_status saevit_run_image(saevit *model, const uint8_t *rgb, int width, int height, const saevit_buffer *outputs,
                               size_t output_count) {
    saevit_status status = SAEVIT_OK;
    void *input = saevit_load_image(rgb, width, height, &status);
    if (!input) return status;
    status = saevit_run(model, input, saevit_model.inputs[0].row, outputs, output_count);
    free(input);
    return status;
}
