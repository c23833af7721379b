"""verify --data: how often the original and the artifact are right about pictures whose classes are known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from saevit_tvm.proof.pictures import Pictures
from saevit_tvm.runtime.tensors import specs_of
from saevit_tvm.support.errors import UsageError

CHUNK_BYTES = 1 << 28  # of pictures that are in memory, and in a process of the artifact's, at a time
TOP5_CLASSES = 10  # with fewer, five guesses say nothing
SHOWN = 3

Answer = Callable[[list[np.ndarray]], list[np.ndarray]]  # class scores of each batch


def compare(
    pictures: Pictures, manifest: dict[str, Any], original: Answer, artifact: Answer, say: Callable[[str], None]
) -> dict[str, Any]:
    """Both asked about every picture, in the batches that the artifact takes."""
    from saevit_tvm.runtime.preprocess import load_image

    (given,) = specs_of(manifest["inputs"])
    batches = pictures.batches(given.shape[0], lambda path: load_image(path, manifest["preprocessing"], given.dtype))
    together = max(1, CHUNK_BYTES // given.nbytes)
    classes: list[np.ndarray] = []
    theirs: list[np.ndarray] = []
    ours: list[np.ndarray] = []
    while chunk := list(islice(batches, together)):
        classes += [known for _, known in chunk]
        padded = [_padded(batch, given.shape[0]) for batch, _ in chunk]
        for answer, rows in ((original, theirs), (artifact, ours)):
            scores = zip(answer(padded), chunk, strict=True)
            rows += [output[: len(known)] for output, (_, known) in scores]
        say(f"{sum(map(len, classes))} of {len(pictures.files)} pictures")
    if not classes:
        raise UsageError(f"no picture can be read ({_some(pictures.unreadable)}): give PNG or JPEG files.")
    known, expected, found = (np.concatenate(parts) for parts in (classes, theirs, ours))
    numbers = np.isfinite(expected).all(1) & np.isfinite(found).all(1)
    return {
        "pictures": len(known),
        "classes": len({known for _, known in pictures.files}),
        "unreadable": len(pictures.unreadable),
        "unreadable_names": [str(path) for path in pictures.unreadable[:SHOWN]],
        "original": _right(expected, known),
        "artifact": _right(found, known),
        "agree": int((numbers & (expected.argmax(1) == found.argmax(1))).sum()),
    }


def _padded(batch: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([batch, np.zeros((size - len(batch), *batch.shape[1:]), batch.dtype)])


def _right(scores: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    """The share of right answers, and of those among five. An answer that is not a number is never right."""
    numbers = np.isfinite(scores).all(1)
    hits = (np.argsort(-scores, axis=1, kind="stable") == classes[:, None]) & numbers[:, None]
    top1, top5 = (float(hits[:, :guesses].any(1).mean()) for guesses in (1, 5))
    return {
        "top1": top1,
        "top5": top5 if scores.shape[1] >= TOP5_CLASSES else None,
        "not_numbers": int((~numbers).sum()),
    }


def _some(paths: list[Path]) -> str:
    shown = ", ".join(f"'{path}'" for path in paths[:SHOWN])
    return shown if len(paths) <= SHOWN else f"{shown} and {len(paths) - SHOWN} more"
