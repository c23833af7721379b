"""Pictures whose classes are known: folders, one a class, or a list in a text file.

Folders are read as torchvision's ImageFolder reads them, so that a model trained on them finds its own classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from saevit_tvm.support.errors import SaevitError, UsageError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"}
SEPARATORS = ("\t", ",", " ")  # the first that a line has ends the path


@dataclass
class Pictures:
    """Files and the index of the class of each; while they are read, those that are no pictures are found."""

    files: list[tuple[Path, int]]
    unreadable: list[Path] = field(default_factory=list)

    def batches(self, size: int, read: Callable[[Path], np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pictures and their classes, `size` at a time; the last may be fewer."""
        pictures: list[np.ndarray] = []
        classes: list[int] = []
        for file, known in self.files:
            try:
                pictures.append(read(file))
            except SaevitError:
                self.unreadable.append(file)
                continue
            classes.append(known)
            if len(pictures) == size:
                yield np.concatenate(pictures), np.array(classes)
                pictures, classes = [], []
        if pictures:
            yield np.concatenate(pictures), np.array(classes)


def find(data: Path, labels: Sequence[str] | None, outputs: int, limit: int | None = None) -> Pictures:
    """The pictures of a folder or a list, or `limit` of them, evenly spread over all."""
    if not data.exists():
        raise UsageError(f"there is no folder or list '{data}': check the path.")
    named = _folders(data) if data.is_dir() else _listed(data)
    indices = _indices(data, {name for _, name in named}, labels, outputs)
    files = [(path, indices[name]) for path, name in named]
    if limit is not None and limit < len(files):
        files = [files[index * len(files) // limit] for index in range(limit)]
    return Pictures(files)


def _folders(data: Path) -> list[tuple[Path, str]]:
    """Every picture at any depth of each folder, whose name is its class."""
    found = []
    for folder in sorted(path for path in data.iterdir() if path.is_dir() and not path.name.startswith(".")):
        pictures = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
        if not pictures:
            raise UsageError(f"'{folder}' holds no pictures: put some there, or take this folder of a class away.")
        found += [(path, folder.name) for path in pictures]
    if not found:
        raise UsageError(f"'{data}' holds no folders of pictures: make one for each class, or give a list of pictures.")
    return found


def _listed(data: Path) -> list[tuple[Path, str]]:
    """The pictures of a list, whose paths begin where the list is."""
    try:
        lines = [line.strip() for line in data.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UsageError(f"'{data}' is no list of pictures: write a picture and its class on each line.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        separator = next((mark for mark in SEPARATORS if mark in line), None)
        if separator is None:
            raise UsageError(f"line {number} of '{data}' names no class: write a picture and its class on each line.")
        path, name = line.split(separator, 1)
        found.append((data.parent / path.strip(), name.strip()))
    if not found:
        raise UsageError(f"'{data}' is empty: write a picture and its class on each line.")
    return found


def _indices(data: Path, names: set[str], labels: Sequence[str] | None, outputs: int) -> dict[str, int]:
    """The output of each class: by the artifact's labels, as a number in a list, or in sorted order."""
    known = {label: index for index, label in enumerate(labels or ())}
    if strange := sorted(names - known.keys()):
        if len(strange) < len(names):
            raise UsageError(
                f"the class '{strange[0]}' of '{data}' is no label of the artifact, and others are: name it as 'run' "
                "does, or take its pictures away."
            )
        numbered = data.is_file() and all(name.isdecimal() for name in names)
        known = {name: int(name) if numbered else index for index, name in enumerate(strange)}
    if beyond := [name for name in strange if known[name] >= outputs]:
        raise UsageError(
            f"the class '{beyond[0]}' of '{data}' is number {known[beyond[0]]}, counted from 0, and the artifact has "
            f"{outputs} outputs: give the data that the model was trained for."
        )
    return {name: known[name] for name in names}
