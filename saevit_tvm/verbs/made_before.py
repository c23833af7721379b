"""Artifacts and SDKs that were made before, kept by all that they depend on: the same is not made again."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import relay_patterns
import schedules
import tuning_logs
from saevit_tvm import backends
from saevit_tvm.models.identity import code_digest, identity
from saevit_tvm.support import cache, toolchain
from saevit_tvm.tuning.store import FILE_NAME, default_root, fingerprints

if TYPE_CHECKING:
    from collections.abc import Mapping

    from saevit_tvm.targets import Target

KIND, FOLDERS = "artifacts", "sdks"
WHERE = ("store", "out", "name", "dump_ir", "reuse")  # options that say where something is, and not what is built


def key(options: Mapping[str, Any], target: Target) -> str | None:
    """The name of what is built: the same for the same content only. None where that cannot be told in advance."""
    model = identity(options["model"], options["weights"], options["labels"], options["pretrained"])
    if model is None:
        return None
    chosen = {name: value for name, value in options.items() if name not in WHERE}
    backend = backends.get(target.kind)
    device = backend.machine() if backend.available()[0] else None
    where = [backends.how_to_run(target), backends.why_not(target), device]
    linker = toolchain.linker(target).cc_argv if target.output == "library" else ()
    records = _records(options["store"]) if options["use_tuned"] else []
    return _digest([model, chosen, dataclasses.asdict(target), where, linker, _tool(), _packages(), records])


def sdk_key(
    artifact: Path, seal: bytes, options: Mapping[str, Any], target: Target, compiler: toolchain.Toolchain
) -> str:
    """The same for an SDK: of an artifact its seal tells all, and its name stands in the files."""
    chosen = [options["flavour"], options["weights"] and _content(Path(options["weights"]))]
    program = Path(compiler.cc_argv[0]).stat()
    how = [compiler.cc_argv, program.st_size, program.st_mtime_ns, backends.how_to_run(target)]
    where = [how, _tool(), _packages(), _records(options["store"])]
    return _digest([artifact.name, seal.hex(), chosen, dataclasses.asdict(target), where])


def _digest(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _content(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else str(file)


def _tool() -> list[str]:
    """Our own files: a change to them may change what is built."""
    packages = [Path(str(each.__file__)).parent for each in (relay_patterns, schedules, tuning_logs)]
    return [code_digest(folder) for folder in (Path(__file__).parents[1], *packages)]


def _packages() -> list[str]:
    """Whatever is installed, with its version."""
    return sorted({each.name for place in sys.path for each in Path(place).glob("*.dist-info")})


def _records(store: Path | None) -> list[str]:
    """The user's tuned records, of all targets: some serve others than their own."""
    root = store or default_root()
    return [_content(root / name / FILE_NAME) for name in fingerprints(root)]


def find(key: str, artifact: Path) -> dict[str, Any] | None:
    """Put what was kept into `artifact`, and its manifest beside it; what else was said of it, or None."""
    kept = cache.load(KIND, key)
    if kept is None:
        return None
    facts, _, content = kept.partition(b"\n")
    found = json.loads(facts)
    artifact.write_bytes(content)
    artifact.with_suffix(".json").write_text(found["manifest"])
    return found | {"manifest": json.loads(found["manifest"])}


def keep(key: str, artifact: Path, facts: dict[str, Any]) -> None:
    """Keep a finished artifact, its manifest, and what else is told of it."""
    manifest = artifact.with_suffix(".json").read_text()
    cache.keep(KIND, key, json.dumps(facts | {"manifest": manifest}).encode() + b"\n" + artifact.read_bytes())


def find_folder(key: str, folder: Path) -> bool:
    """Put a folder that was kept under a key into `folder`, if there is one."""
    kept = cache.load(FOLDERS, key)
    if kept is None:
        return False
    with tarfile.open(fileobj=io.BytesIO(kept)) as packed:
        # Older Pythons have no filters, and extractall() no such option.
        packed.extraction_filter = getattr(tarfile, "data_filter", lambda member, _path: member)
        packed.extractall(folder)
    return True


def keep_folder(key: str, folder: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(folder, ".")
    cache.keep(FOLDERS, key, packed.getvalue())
