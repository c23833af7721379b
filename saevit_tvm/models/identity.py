"""What a model is made from, told by files and without PyTorch, so that nothing is made again that was made before."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path


def identity(model: str, weights: str | None, labels: Path | None, pretrained: bool) -> list[str] | None:
    """Digests of all that the user's words stand for; None where only making the model tells.

    SAEViT is part of this package. What timm makes follows from its code. What a hub has, only the hub knows.
    """
    if pretrained:
        return None
    named = [Path(name) for name in (model, weights, labels) if name is not None]
    files = [file for file in named if file.is_file()]
    found = [_digest(file) for file in files]
    if Path(model).suffix == ".onnx" and files:
        try:
            found += [_digest(file) for file in _beside(Path(model))]
        except Exception:  # whoever opens it says what is wrong with it
            return None
    if model.startswith("timm:"):
        spec = importlib.util.find_spec("timm")
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found.append(code_digest(Path(folder)))
    return found


def _beside(path: Path) -> list[Path]:
    """The files that have an ONNX model's larger weights."""
    import onnx
    from onnx import external_data_helper as helper

    tensors = helper._get_all_tensors(onnx.load(path, load_external_data=False))
    return [path.parent / helper.ExternalDataInfo(each).location for each in tensors if helper.uses_external_data(each)]


def code_digest(folder: Path) -> str:
    """Of every file below a folder, but for what Python compiled."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if "__pycache__" not in file.parts and file.is_file():
            total.update(f"{file.relative_to(folder)}\0{_digest(file)}\0".encode())
    return total.hexdigest()


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
