"""run: classify pictures with an artifact alone; all of them or, if one cannot be read, none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saevit_tvm.runtime.engine import Engine, load
from saevit_tvm.support.errors import ArtifactError, UsageError


def run(path: Path, images: Sequence[Path], top: int | None = None) -> dict[str, Any]:
    """For each picture the `top` classes with their probabilities, the likeliest first."""
    engine = load(path)
    manifest = engine.manifest
    shape = engine.outputs[0].shape
    if len(engine.outputs) != 1 or len(shape) != 2 or engine.outputs[0].dtype != "float32":
        raise ArtifactError(
            f"'{path}' gives no class scores but feature maps or decisions: to classify, build without --features-only."
        )
    if not manifest["preprocessing"]:
        takes = " and ".join(f"{'x'.join(map(str, spec.shape))} {spec.dtype}" for spec in engine.inputs)
        raise ArtifactError(f"'{path}' takes {takes}, not pictures: call it from Python, C or C++.")
    classes = shape[1]
    top = min(5, classes) if top is None else top
    if not 1 <= top <= classes:
        raise UsageError(f"--top {top} is impossible: '{path}' knows {classes} classes.")
    from saevit_tvm.runtime.preprocess import load_image

    pictures = [load_image(image, manifest["preprocessing"], engine.inputs[0].dtype) for image in images]
    scores = _scores(engine, np.concatenate(pictures))
    for image, row in zip(images, scores, strict=True):
        if not np.isfinite(row).all():
            raise ArtifactError(f"'{path}' answers NaN or infinity for '{image}': check the model's weights.")
    labels = manifest["labels"] or [str(index) for index in range(classes)]
    results = [{"image": str(image), "top": _best(row, labels, top)} for image, row in zip(images, scores, strict=True)]
    return {"artifact": str(path), "weights": manifest["weights"]["source"], "results": results}


def _scores(engine: Engine, pictures: np.ndarray) -> np.ndarray:
    """Class scores of any number of pictures, in the batches the artifact was built for."""
    batch = engine.manifest["inputs"][0]["shape"][0]
    rows = []
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        padding = np.zeros((batch - len(part), *part.shape[1:]), part.dtype)
        rows.append(np.array(engine(np.concatenate([part, padding])))[: len(part)])
    return np.concatenate(rows)


def _best(scores: np.ndarray, labels: Sequence[str], top: int) -> list[dict[str, Any]]:
    exponentials = np.exp(scores.astype(np.float64) - scores.max())
    probabilities = exponentials / exponentials.sum()
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [
        {"class": int(index), "label": labels[index], "probability": float(probabilities[index])} for index in order
    ]
