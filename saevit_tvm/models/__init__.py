"""The PyTorch side: SAEViT and its variants (`saevit`), weights (`weights`), any other model (`opening`).

PyTorch is imported only when a model is really made.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevit_tvm.support.errors import unknown

if TYPE_CHECKING:
    from torch import nn

    from saevit_tvm.models.saevit import SAEViT


# Other people's models that were built for a CPU and compared with PyTorch: benchmarks/zoo.py writes it.
TESTED = Path(__file__).with_name("tested.json")


def names() -> list[str]:
    """The registered models, smallest first."""
    from saevit_tvm.models.saevit import VARIANTS

    return list(VARIANTS)


def create(
    name: str,
    *,
    num_classes: int = 1000,
    features_only: bool = False,
    drop_path: float = 0.0,
    in_chans: int = 3,
) -> SAEViT:
    """A registered model with fresh weights, ready to train."""
    from saevit_tvm.models.saevit import VARIANTS

    if name not in VARIANTS:
        raise unknown("model", name, VARIANTS)
    return VARIANTS[name](num_classes=num_classes, features_only=features_only, drop_path=drop_path, in_chans=in_chans)


def describe(name: str) -> dict[str, Any]:
    """What a table of models shows: dims, depths, parameters, and multiply-accumulates (G) at 224 x 224."""
    import torch

    from saevit_tvm.models.saevit import VARIANTS

    with torch.device("meta"):
        model = create(name)
    return {
        "name": name,
        "summary": VARIANTS[name].__doc__,
        "dims": list(model.dims),
        "depths": list(model.depths),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "gmacs": macs(model, 224) / 1e9,
    }


def macs(module: nn.Module, image_size: int) -> int:
    """Multiply-accumulates of one image as papers count them: those of convolutions and linear layers.

    The products inside attention, which have no weights, are another 1 % in SAEViT.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    weight = next(module.parameters())
    image = torch.zeros(1, 3, image_size, image_size, device=weight.device, dtype=weight.dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(image)
    flops = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in flops.items() if operator is not torch.ops.aten.bmm) // 2
