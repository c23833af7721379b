"""The two generated C files of an SDK: what the model is, and the plan of an inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from saevit_tvm.runtime.manifest import at_batch, batches, entry
from saevit_tvm.runtime.preprocess import channels_last, enlarged
from schedules.dtypes import dlpack

if TYPE_CHECKING:
    from saevit_tvm.sdk.plan import Plan, Tensor

_PLACES = {"arena": "IN_ARENA", "weights": "IN_WEIGHTS", "input": "IN_INPUT"}


def describe(manifest: dict[str, Any], artifact_digest: bytes, needs_opencl: bool) -> str:
    """model.c: the description that a program can ask for, and what the runtime must know beside the plan."""
    labels = manifest["labels"] or []
    several = manifest.get("batches", [])
    size = manifest["preprocessing"].get("image_size", [0, 0])
    lines = [
        "/* Generated: what the model is. */",
        '#include "internal.h"',
        "",
        *_entries(manifest),
        *_tensors("outputs", manifest["outputs"], several[-1] if several else 1),
        *([f"static const size_t batches[] = {{{_list(several)}}};"] if several else []),
        *_labels(labels),
        "",
        "const saevit_description saevit_model = {",
        f"    .model = {quoted(manifest['model'])},",
        f"    .version = {quoted(manifest['versions']['saevit_tvm'])},",
        f"    .target = {quoted(manifest['target']['name'])},",
        "    .flavour = saevit_flavour,",
        f"    .weights_digest = {quoted(manifest['weights_digest'])},",
        f"    .inputs = inputs_{len(batches(manifest)) - 1},",
        f"    .input_count = {len(manifest['inputs'])},",
        "    .outputs = outputs,",
        f"    .output_count = {len(manifest['outputs'])},",
        f"    .batches = {'batches' if several else 'NULL'},",
        f"    .batch_count = {len(several)},",
        f"    .labels = {'labels' if labels else 'NULL'},",
        f"    .label_count = {len(labels)},",
        f"    .image_width = {size[1]},",
        f"    .image_height = {size[0]},",
        "};",
        "",
        *_preprocessing(manifest["preprocessing"]),
        "",
        f"const char *const saevit_needed_arch = {quoted(manifest['target']['arch'])};",
        "const char *const saevit_needed_features[] = {",
        *(f"    {quoted(name)}," for name in manifest["target"]["features"]),
        "    NULL,",
        "};",
        "",
        f"const int saevit_needs_opencl = {int(needs_opencl)};",
        f"const uint8_t saevit_artifact_digest[32] = {{{', '.join(f'0x{byte:02x}' for byte in artifact_digest)}}};",
    ]
    return "\n".join(lines) + "\n"


def _entries(manifest: dict[str, Any]) -> list[str]:
    """The functions of the library, and the inputs that each takes."""
    lines, rows = [], []
    for at, batch in enumerate(batches(manifest)):
        pictures = batch if "batches" in manifest else 1
        name = entry(batch, batches(manifest)[-1])
        lines += _tensors(f"inputs_{at}", at_batch(manifest, batch)["inputs"], pictures)
        rows.append(f"    {{{quoted(name)}, {pictures}, inputs_{at}}},")
    count = f"const size_t saevit_entry_count = {len(rows)};"
    return [*lines, "const entry_point saevit_entries[] = {", *rows, "};", count]


def _tensors(name: str, described: Sequence[dict[str, Any]], rows: int) -> list[str]:
    """A table of tensors that hold so many pictures, and their shapes before it."""
    shapes = [f"{name}_shape_{at}" for at in range(len(described))]
    return [
        *(_shape(shape, each["shape"]) for shape, each in zip(shapes, described, strict=True)),
        f"static const saevit_tensor {name}[] = {{",
        *(f"    {_tensor(each, shape, rows)}," for shape, each in zip(shapes, described, strict=True)),
        "};",
    ]


def _labels(labels: Sequence[str]) -> list[str]:
    if not labels:
        return []
    return ["static const char *const labels[] = {", *(f"    {quoted(label)}," for label in labels), "};"]


def _preprocessing(how: dict[str, Any]) -> list[str]:
    if not how:  # the model does not say: pictures go in as they are, scaled to 0..1
        how = {"resize": "bilinear", "crop": "center", "scale": 1 / 255, "mean": [0, 0, 0], "std": [1, 1, 1]}
    tall, wide = enlarged(how) if "crop_pct" in how else (0, 0)
    return [
        "const preprocessing saevit_preprocessing = {",
        f"    .resize = RESIZE_{how['resize'].upper()},",
        f"    .crop_center = {int(how['crop'] == 'center')},",
        f"    .enlarged_width = {wide},",
        f"    .enlarged_height = {tall},",
        f"    .channels_last = {int(channels_last(how))},",
        f"    .scale = {_number(how['scale'])},",
        f"    .mean = {{{', '.join(map(_number, how['mean']))}}},",
        f"    .deviation = {{{', '.join(map(_number, how['std']))}}},",
        "};",
    ]


def plan_source(plan: Plan) -> str:
    """plan.c: every tensor, every kernel with its tensors, in order."""
    steps = [step for inference in plan.entries for step in inference.steps]
    shapes = sorted({tensor.shape for tensor in plan.tensors})
    names = {shape: f"shape_{i}" for i, shape in enumerate(shapes)}
    lines = [
        "/* Generated: an inference, kernel by kernel. */",
        '#include "plan.h"',
        "",
        *(f"{_kernel(name)};" for name in sorted({step.kernel for step in steps})),
        "",
        *(_shape(names[shape], shape) for shape in shapes),
        "",
        "static const plan_tensor tensors[] = {",
        *(f"    {_plan_tensor(tensor, names[tensor.shape])}," for tensor in plan.tensors),
        "};",
        "",
        *(f"static const uint16_t tensors_{i}[] = {{{_list(step.tensors)}}};" for i, step in enumerate(steps)),
        "",
        "static const plan_step steps[] = {",
        *(
            f"    {{__tvm_ffi_{step.kernel}, {quoted(step.kernel)}, tensors_{i}, {len(step.tensors)}}},"
            for i, step in enumerate(steps)
        ),
        "};",
        "",
        *_plan_entries(plan),
        "",
        "const plan saevit_plan = {",
        "    .tensors = tensors,",
        f"    .tensor_count = {len(plan.tensors)},",
        "    .steps = steps,",
        f"    .step_count = {len(steps)},",
        f"    .argument_count = {sum(len(step.tensors) for step in steps)},",
        "    .entries = entries,",
        f"    .arena_size = {plan.arena_size},",
        f"    .shared_scratch = {plan.shared_scratch},",
        f"    .scratch_size = {plan.scratch_size},",
        "};",
    ]
    return "\n".join(lines) + "\n"


def _plan_entries(plan: Plan) -> list[str]:
    """For each function of the library its steps among all, where their arguments begin, and its outputs."""
    results, rows = [], []
    step = argument = 0
    for at, inference in enumerate(plan.entries):
        results.append(f"static const uint16_t results_{at}[] = {{{_list(inference.outputs)}}};")
        rows.append(f"    {{{step}, {len(inference.steps)}, {argument}, results_{at}}},")
        step += len(inference.steps)
        argument += sum(len(each.tensors) for each in inference.steps)
    return [*results, "static const plan_entry entries[] = {", *rows, "};"]


def _kernel(name: str) -> str:
    return f"int __tvm_ffi_{name}(void *, const kernel_argument *, int32_t, kernel_argument *)"


def _plan_tensor(tensor: Tensor, shape: str) -> str:
    code, bits = dlpack(tensor.dtype)
    return f"{{{_PLACES[tensor.place]}, {tensor.offset}, {code}, {bits}, {len(tensor.shape)}, {shape}}}"


def _tensor(described: dict[str, Any], shape: str, rows: int) -> str:
    size = int(np.prod(described["shape"])) * np.dtype(described["dtype"]).itemsize
    name, dtype = quoted(described["name"]), quoted(described["dtype"])
    return f"{{{name}, {dtype}, {shape}, {len(described['shape'])}, {size}, {size // rows}}}"


def _shape(name: str, shape: Sequence[int]) -> str:
    return f"static const int64_t {name}[] = {{{_list(shape) or 0}}};"


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _number(value: float) -> str:
    """A float32 exactly, as C reads it."""
    return f"{float(np.float32(value)).hex()}f"


def quoted(text: str) -> str:
    """A C string literal: what is not plain ASCII becomes three octal digits, which no next character joins."""
    plain = {ord(c) for c in '"\\?'}
    parts = (chr(b) if 32 <= b < 127 and b not in plain else f"\\{b:03o}" for b in text.encode())
    return f'"{"".join(parts)}"'
