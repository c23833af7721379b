"""A model, wherever it came from, as a Relax module with its weights bound as constants.

Importing a PyTorch model takes seconds, most of them for loading the machinery of torch.export. So what was imported is
kept in the cache folder, under a hash of all that it depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import tvm
from tvm_ffi.serialization import from_json_graph_str

from saevit_tvm.support import cache

if TYPE_CHECKING:
    from saevit_tvm.models.opening import ModelSource

KIND = "imported"
PACKAGES = ("apache-tvm", "apache-tvm-ffi", "torch", "numpy", "timm", "onnx")


def import_model(source: ModelSource) -> tvm.IRModule:
    """One function `main`: the model's inputs in, its outputs out."""
    key = _key(source)
    found = None if key is None else _kept(key)
    if found is not None:
        return found
    from saevit_tvm.compiler.importers import gate, onnx, torch  # only here: PyTorch takes two seconds

    imported = torch.import_exported(source) if source.onnx is None else onnx.import_onnx(source)
    gate.check(source, imported)
    mod = imported.mod if source.onnx is None else tvm.relax.transform.DecomposeOpsForInference()(imported.mod)
    if key is not None:
        cache.keep(KIND, key, tvm.ir.save_json(mod).encode())
    return mod


def _kept(key: str) -> tvm.IRModule | None:
    content = cache.load(KIND, key)
    if content is not None:
        with contextlib.suppress(Exception):  # another build of TVM under the same version: import anew
            return from_json_graph_str(content.decode())  # without TVM's search for what older versions wrote
    return None


def _key(source: ModelSource) -> str | None:
    """The name of what is imported: the same for the same content only. None where it is not kept."""
    if source.graph_digest is None or source.weight_bytes > cache.KEPT_BYTES // 4:
        return None
    named = [source.graph_digest, source.weights_digest, source.inputs, tvm.__version__]
    total = hashlib.sha256(json.dumps([*named, *map(_version, PACKAGES)]).encode())
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
