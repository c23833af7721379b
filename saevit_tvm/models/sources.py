"""Opening a model, wherever it comes from: a registered name, `timm:NAME`, a `.pt2` or a `.onnx`.

Everything after this room sees one `ModelSource`: what to compile, what to compare with, what to tell the user.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saevit_tvm import models
from saevit_tvm.errors import ModelError, UsageError, unknown
from saevit_tvm.models import weights as weight_files

IMAGE_SIZE = 224
SMALLEST, LARGEST = 32, 4096  # below the total stride the last stage has no whole cell
LARGEST_BATCH = 1024
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
Size = tuple[int, int]


@dataclass(frozen=True)
class ModelSource:
    """A model with its weights, at one input shape."""

    name: str
    module: nn.Module
    input_shape: tuple[int, int, int, int]
    output_names: tuple[str, ...]
    recipe: dict[str, Any]
    weights: dict[str, Any]
    weights_digest: str
    preprocessing: dict[str, Any]
    labels: tuple[str, ...] | None = None
    regions: dict[str, int] = dataclasses.field(default_factory=dict)
    onnx: Any = None

    def reference(self, x: np.ndarray) -> list[np.ndarray]:
        """What the original computes, in float32."""
        with torch.no_grad():
            outputs = self.module(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)))
        return [output.numpy() for output in _as_list(outputs)]

    def exported(self) -> torch.export.ExportedProgram:
        """The graph that the compiler imports."""
        with torch.no_grad():
            return torch.export.export(self.module, (torch.zeros(self.input_shape),), strict=False)


def open_model(
    model: str = "saevit_xs",
    *,
    weights: str | Path | None = None,
    batch: int = 1,
    image_size: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    features_only: bool = False,
    seed: int = 0,
) -> ModelSource:
    """A model by name or file. Without `weights` a named model gets random ones, alike for the same seed."""
    size = None if image_size is None else _checked_size(image_size)
    if not 1 <= batch <= LARGEST_BATCH:
        raise UsageError(f"batch {batch} is impossible: choose 1 to {LARGEST_BATCH}.")
    if num_classes is not None and num_classes < 1:
        raise UsageError(f"{num_classes} classes are impossible: choose 1 or more.")
    if model in models.names():
        return _open_registered(model, weights, batch, size, num_classes, features_only, seed)
    raise unknown("model", model, models.names())


# Registered models --------------------------------------------------


def _open_registered(
    name: str,
    weights: str | Path | None,
    batch: int,
    size: Size | None,
    num_classes: int | None,
    features_only: bool,
    seed: int,
) -> ModelSource:
    checkpoint = None if weights is None else Checkpoint.open(weights)
    if checkpoint is not None:
        checkpoint.check_made_for(name)
        size = size or checkpoint.image_size
        num_classes = num_classes or checkpoint.num_classes
    size, num_classes = size or (IMAGE_SIZE, IMAGE_SIZE), num_classes or 1000
    if min(size) < SMALLEST:
        raise UsageError(f"image size {_show(size)} is too small for {name}: choose {SMALLEST} or more.")
    module = models.create(name, num_classes=num_classes, features_only=features_only).eval()
    if checkpoint is None:
        weight_files.randomise(module, seed)
    else:
        checkpoint.apply_to(module)
    blocks = sum(module.depths)
    return ModelSource(
        name=name,
        module=module,
        input_shape=(batch, 3, *size),
        output_names=tuple(f"stage{i + 1}" for i in range(4)) if features_only else ("logits",),
        recipe=_recipe(name, batch, size, num_classes, features_only),
        weights={"source": "random", "seed": seed} if checkpoint is None else checkpoint.origin,
        weights_digest=weight_files.digest(module),
        preprocessing=_preprocessing(size, checkpoint),
        labels=None if checkpoint is None or features_only else checkpoint.labels(num_classes),
        regions={"saa": blocks, "ciffn": blocks, "dwsconv": blocks},
    )


@dataclass(frozen=True)
class Checkpoint:
    """A weights file and what its metadata says of it."""

    label: str
    origin: dict[str, str]
    state: dict[str, Tensor]
    metadata: dict[str, str]

    @staticmethod
    def open(given: str | Path) -> Checkpoint:
        """A file, or the name of a checkpoint that ships with the package; such a file comes first."""
        path, shipped = Path(given), weight_files.shipped()
        if not path.exists() and str(given) in shipped:
            origin = {"source": "shipped", "name": str(given)}
            return Checkpoint(f"checkpoint '{given}'", origin, *weight_files.load_state(shipped[str(given)]))
        if not path.exists() and not path.suffix:
            raise unknown("checkpoint", str(given), [*shipped, "a path to a .safetensors or .pt file"])
        return Checkpoint(f"'{given}'", {"source": "file", "file": path.name}, *weight_files.load_state(path))

    def check_made_for(self, name: str) -> None:
        made_for = self.metadata.get("saevit.model", name)
        if made_for != name:
            raise ModelError(
                f"{self.label} holds weights of {made_for}, not of {name}: add --model {made_for}."
            )

    def apply_to(self, module: nn.Module) -> None:
        own = module.state_dict()
        features_only = getattr(module, "features_only", False)
        state = {n: t for n, t in self.state.items() if n in own or not (features_only and _of_head(n))}
        weight_files.apply_state(module, state, self.label)

    @property
    def num_classes(self) -> int | None:
        """The rows of the classifier, which is the truth, whatever the metadata says."""
        head = self.state.get("head.weight")
        return None if head is None or head.dim() != 2 else head.shape[0]

    @property
    def image_size(self) -> Size | None:
        return self._read("saevit.image_size", lambda value: _checked_size(value))

    @property
    def preprocessing(self) -> dict[str, Any]:
        return self._read("saevit.preprocessing", _checked_preprocessing) or {}

    def labels(self, num_classes: int) -> tuple[str, ...] | None:
        return self._read("saevit.labels", lambda value: _checked_labels(value, num_classes))

    def _read(self, key: str, check: Callable[[Any], Any]) -> Any:
        if key not in self.metadata:
            return None
        try:
            return check(json.loads(self.metadata[key]))
        except (ValueError, TypeError, KeyError, RecursionError, UsageError) as error:
            raise ModelError(f"{self.label} has metadata '{key}' that makes no sense: {error}.") from error


def _of_head(name: str) -> bool:
    return name.startswith(("norm.", "head."))


# Shared -------------------------------------------------------------


def _checked_size(given: int | Sequence[int]) -> Size:
    try:
        height, width = (given, given) if isinstance(given, int) else (int(v) for v in given)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"image size {given} is not a size: give one number, or height and width."
        ) from error
    if not (1 <= height <= LARGEST and 1 <= width <= LARGEST):
        raise UsageError(
            f"image size {_show((height, width))} is impossible: choose {SMALLEST} to {LARGEST}."
        )
    return height, width


def _show(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def _recipe(
    name: str, batch: int, size: Size, num_classes: int | None, features_only: bool
) -> dict[str, Any]:
    return {
        "model": name,
        "batch": batch,
        "image_size": list(size),
        "num_classes": num_classes,
        "features_only": features_only,
    }


def _preprocessing(size: Size, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """ImageNet's customs, unless the checkpoint was trained with others."""
    stated = {} if checkpoint is None else checkpoint.preprocessing
    custom = {"mode": "RGB", "resize": "bicubic", "crop": "center", "scale": 1 / 255, **IMAGENET}
    return {**custom, **stated, "image_size": list(size)}


def _checked_preprocessing(value: dict[str, Any]) -> dict[str, Any]:
    from saevit_tvm.runtime.preprocess import check

    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    check(value)
    return value


def _checked_labels(value: list[str], num_classes: int) -> tuple[str, ...] | None:
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise ValueError("it is not a list of names")
    return tuple(value) if len(value) == num_classes else None


def _as_list(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
