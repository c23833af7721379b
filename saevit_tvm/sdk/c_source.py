"""The two generated C files of an SDK: what the model is, and the plan of one inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from saevit_tvm.runtime.preprocess import channels_last
from schedules.dtypes import dlpack

if TYPE_CHECKING:
    from saevit_tvm.sdk.plan import Plan, Tensor

_PLACES = {"arena": "IN_ARENA", "weights": "IN_WEIGHTS", "input": "IN_INPUT"}


def describe(manifest: dict[str, Any], artifact_digest: bytes, needs_opencl: bool) -> str:
    """model.c: the description that a program can ask for, and what the runtime must know beside the plan."""
    labels = manifest["labels"] or []
    outputs = manifest["outputs"]
    size = manifest["preprocessing"].get("image_size", [0, 0])
    lines = [
        "/* Generated: what the model is. */",
        '#include "internal.h"',
        "",
        _shape("input_shape", manifest["inputs"][0]["shape"]),
        *(_shape(f"output_shape_{i}", output["shape"]) for i, output in enumerate(outputs)),
        "static const saevit_tensor outputs[] = {",
        *(f"    {_tensor(output, f'output_shape_{i}')}," for i, output in enumerate(outputs)),
        "};",
        *_labels(labels),
        "",
        "const saevit_description saevit_model = {",
        f"    .model = {quoted(manifest['model'])},",
        f"    .version = {quoted(manifest['versions']['saevit_tvm'])},",
        f"    .target = {quoted(manifest['target']['name'])},",
        "    .flavour = saevit_flavour,",
        f"    .weights_digest = {quoted(manifest['weights_digest'])},",
        f"    .input = {_tensor(manifest['inputs'][0], 'input_shape')},",
        "    .outputs = outputs,",
        f"    .output_count = {len(outputs)},",
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


def _labels(labels: Sequence[str]) -> list[str]:
    if not labels:
        return []
    return ["static const char *const labels[] = {", *(f"    {quoted(label)}," for label in labels), "};"]


def _preprocessing(how: dict[str, Any]) -> list[str]:
    if not how:  # the model does not say: pictures go in as they are, scaled to 0..1
        how = {"resize": "bilinear", "crop": "center", "scale": 1 / 255, "mean": [0, 0, 0], "std": [1, 1, 1]}
    return [
        "const preprocessing saevit_preprocessing = {",
        f"    .resize = RESIZE_{how['resize'].upper()},",
        f"    .crop_center = {int(how['crop'] == 'center')},",
        f"    .channels_last = {int(channels_last(how))},",
        f"    .scale = {_number(how['scale'])},",
        f"    .mean = {{{', '.join(map(_number, how['mean']))}}},",
        f"    .deviation = {{{', '.join(map(_number, how['std']))}}},",
        "};",
    ]


def plan_source(plan: Plan) -> str:
    """plan.c: every tensor, every kernel with its tensors, in order."""
    kernels = sorted({step.kernel for step in plan.steps})
    shapes = sorted({tensor.shape for tensor in plan.tensors})
    names = {shape: f"shape_{i}" for i, shape in enumerate(shapes)}
    lines = [
        "/* Generated: one inference, kernel by kernel. */",
        '#include "plan.h"',
        "",
        *(f"{_kernel(name)};" for name in kernels),
        "",
        *(_shape(names[shape], shape) for shape in shapes),
        "",
        "static const plan_tensor tensors[] = {",
        *(f"    {_plan_tensor(tensor, names[tensor.shape])}," for tensor in plan.tensors),
        "};",
        "",
        *(f"static const uint16_t tensors_{i}[] = {{{_list(step.tensors)}}};" for i, step in enumerate(plan.steps)),
        "",
        "static const plan_step steps[] = {",
        *(
            f"    {{__tvm_ffi_{step.kernel}, {quoted(step.kernel)}, tensors_{i}, {len(step.tensors)}}},"
            for i, step in enumerate(plan.steps)
        ),
        "};",
        "",
        f"static const uint16_t results[] = {{{_list(plan.outputs)}}};",
        "",
        "const plan saevit_plan = {",
        "    .tensors = tensors,",
        f"    .tensor_count = {len(plan.tensors)},",
        "    .steps = steps,",
        f"    .step_count = {len(plan.steps)},",
        f"    .argument_count = {sum(len(step.tensors) for step in plan.steps)},",
        "    .outputs = results,",
        f"    .arena_size = {plan.arena_size},",
        f"    .shared_scratch = {plan.shared_scratch},",
        f"    .scratch_size = {plan.scratch_size},",
        "};",
    ]
    return "\n".join(lines) + "\n"


def _kernel(name: str) -> str:
    return f"int __tvm_ffi_{name}(void *, const kernel_argument *, int32_t, kernel_argument *)"


def _plan_tensor(tensor: Tensor, shape: str) -> str:
    code, bits = dlpack(tensor.dtype)
    return f"{{{_PLACES[tensor.place]}, {tensor.offset}, {tensor.size}, {code}, {bits}, {len(tensor.shape)}, {shape}}}"


def _tensor(entry: dict[str, Any], shape: str) -> str:
    size = int(np.prod(entry["shape"])) * np.dtype(entry["dtype"]).itemsize
    return f"{{{quoted(entry['name'])}, {quoted(entry['dtype'])}, {shape}, {len(entry['shape'])}, {size}}}"


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
