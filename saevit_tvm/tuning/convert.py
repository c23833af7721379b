"""Records of version 0.1.0, which knew a kernel by a structural hash, as today's, which know it by its spec."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from schedules.kernels import SPEC, TILING, candidate_key
from schedules.spec import Epilogue, KernelSpec, Tensor

REGION, SHAPE = "saevit.region", "saevit.shape"  # attributes of a declaration, then


def kernel(packed: str) -> tuple[str, str] | None:
    """Key and packed module of a declared kernel of 0.1.0, as they are today; None for any other kernel."""
    from saevit_tvm.tuning import replay

    found = replay.unpack_workload(packed)
    if found is None or REGION not in found.mod["main"].attrs:
        return None
    module = found.mod.clone()
    func = module["main"]
    spec = _spec(str(func.attrs[REGION]), json.loads(str(func.attrs[SHAPE])), func)
    if spec is None:
        return None
    module["main"] = func.without_attr(REGION).without_attr(SHAPE).with_attr(SPEC, spec.text)
    return spec.text, replay.pack_module(module)


def candidate(key: str, trace: list[Any]) -> str | None:
    """The name that a tiled kernel has today."""
    noted = [instruction[1][1] for instruction in trace[0] if instruction[2] == [TILING]]
    return candidate_key(key, json.loads(noted[0][1:-1])) if noted else None  # TVM writes text in quotes


def _spec(region: str, shape: dict[str, Any], func: Any) -> KernelSpec | None:
    """What a declaration of 0.1.0 declares."""
    from schedules.gpu.registry import KERNELS

    if region.startswith("gpu."):
        of_gpu = KERNELS.get(region.replace(".", "_"))
        return None if of_gpu is None else of_gpu(**_fields(region, shape)).spec
    if region not in _ATTRS:
        return None
    x, *weights, out = (_tensor(param) for param in func.params)
    layout = "NCHW" if shape.get("channels_first") else "NHWC"
    out = replace(out, layout="NHWC") if len(out.shape) == 4 else out
    epilogue = () if region != "conv" else ("bias", *(["gelu"] if shape.get("activation") == "gelu" else []))
    return KernelSpec.of(region, [replace(x, layout=layout)], weights, [out], _ATTRS[region](shape), epilogue)


def _tensor(param: Any) -> Tensor:
    return Tensor(str(param.name), tuple(int(extent) for extent in param.shape), str(param.dtype))


_ATTRS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "saa": lambda shape: {name: shape[name] for name in ("heads", "r", "eps", "scale")},
    "conv": lambda shape: {"strides": (shape["stride"],) * 2, "padding": (shape["padding"],) * 4},
    **dict.fromkeys(("ciffn", "dwsconv", "head"), lambda _shape: {}),
}


def _fields(region: str, shape: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a kernel of a GPU: windows were square, and what followed had fields of its own."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in shape.items()}
    if region == "gpu.depthwise":
        return {**fields, "padding": (1, 1, 1, 1), "epilogue": Epilogue(("bias", "gelu"))}
    if "kernel" not in fields:
        return fields
    for new, old, count in (("kernel", "kernel", 2), ("strides", "stride", 2), ("padding", "padding", 4)):
        fields[new] = (fields.pop(old),) * count
    activation, residual = fields.pop("activation"), fields.pop("residual")
    steps = ["bias", *([activation] if activation == "gelu" else []), *(["add residual"] if residual else [])]
    return {**fields, "epilogue": Epilogue(tuple(steps))}
