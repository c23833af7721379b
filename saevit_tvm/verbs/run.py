"""run: classify pictures with an artifact alone, all of them or, if one cannot be read, none; or answer arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from saevit_tvm.proof.parity import as_list
from saevit_tvm.runtime.engine import Engine, load
from saevit_tvm.runtime.tensors import shown, specs_of
from saevit_tvm.support import workspace
from saevit_tvm.support.errors import ArtifactError, UsageError

ARRAYS = (".npy", ".npz")
SHOWN = 6  # numbers of an output


def run(path: Path, images: Sequence[Path], top: int | None = None) -> dict[str, Any]:
    """For each picture the `top` classes with their probabilities, the likeliest first."""
    engine = load(path)
    manifest = engine.manifest
    known = classes(path, manifest)
    top = min(5, known) if top is None else top
    if not 1 <= top <= known:
        raise UsageError(f"--top {top} is impossible: '{path}' knows {known} classes.")
    from saevit_tvm.runtime.preprocess import load_image

    pictures = [load_image(image, manifest["preprocessing"], engine.inputs[0].dtype) for image in images]
    scores = _scores(engine, np.concatenate(pictures))
    for image, row in zip(images, scores, strict=True):
        if not np.isfinite(row).all():
            raise ArtifactError(
                f"'{path}' names no class for '{image}', its answer is not a number (NaN or infinity): check the "
                "model's weights, and this picture."
            )
    labels = manifest["labels"] or [str(index) for index in range(known)]
    results = [{"image": str(image), "top": _best(row, labels, top)} for image, row in zip(images, scores, strict=True)]
    return {"artifact": str(path), "weights": manifest["weights"]["source"], "results": results}


def run_arrays(path: Path, files: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """The outputs for inputs of any kind: one `.npy` each, in order, or a `.npz` that has them by name."""
    engine = load(path)
    given, named = _arrays(files)
    try:
        answer = engine(*given, **named)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    outputs = dict(zip((spec.name for spec in engine.outputs), as_list(answer), strict=True))
    if out is not None:
        with workspace.staging(out.parent) as staged:
            with (staged / out.name).open("wb") as file:
                np.savez(file, allow_pickle=False, **outputs)
            workspace.place([(staged / out.name, out)])
    described = [
        {"name": name, "dtype": str(value.dtype), "shape": list(value.shape), "values": _first(value)}
        for name, value in outputs.items()
    ]
    return {"artifact": str(path), "weights": engine.manifest["weights"]["source"], "outputs": described}


def _arrays(files: Sequence[Path]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    given: list[np.ndarray] = []
    named: dict[str, np.ndarray] = {}
    for file in files:
        if not file.is_file():
            raise UsageError(f"there is no array '{file}': check the path.")
        try:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                given.append(loaded)
            else:
                named |= dict(loaded)
        except (ValueError, OSError, EOFError, BadZipFile) as error:
            raise UsageError(f"'{file}' holds no arrays: write it with numpy.save or numpy.savez.") from error
    return given, named


def _first(value: np.ndarray) -> list[Any]:
    """A few numbers to look at; what is no number is None."""
    few = value.reshape(-1)[:SHOWN].tolist()
    return [number if np.isfinite(number) else None for number in few]


def classes(path: Path, manifest: dict[str, Any]) -> int:
    """How many classes the artifact tells apart, or a sentence that says why it does not classify pictures."""
    if not manifest["preprocessing"]:
        inputs = specs_of(manifest["inputs"])
        takes = " and ".join(f"{shown(spec.shape)} {spec.dtype}" for spec in inputs)
        raise ArtifactError(f"'{path}' takes {takes}, not pictures: 'run' takes .npy files, Python and C arrays.")
    output, *more = specs_of(manifest["outputs"])
    if more or len(output.shape) != 2 or output.dtype != "float32":
        raise ArtifactError(
            f"'{path}' gives no class scores but feature maps or decisions: to classify, build without --features-only."
        )
    return output.shape[1]


def _scores(engine: Engine, pictures: np.ndarray) -> np.ndarray:
    """Class scores of any number of pictures, in the batches the artifact was built for."""
    if "batches" in engine.manifest:
        return np.array(engine(pictures))
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
