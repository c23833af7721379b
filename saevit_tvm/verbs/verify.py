"""verify: does an artifact still compute what PyTorch computes?

Against the PyTorch model itself where it can be made again, else against the answers recorded at build time.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saevit_tvm import backends, targets
from saevit_tvm.proof import answers as proof
from saevit_tvm.proof import device as on_device
from saevit_tvm.proof import parity, stand_in
from saevit_tvm.proof.pictures import Pictures, find
from saevit_tvm.proof.stand_in import StoodIn
from saevit_tvm.runtime.artifact import check_runnable, read_manifest
from saevit_tvm.runtime.manifest import batches
from saevit_tvm.runtime.tensors import Inputs, specs_of
from saevit_tvm.support import workspace
from saevit_tvm.support.errors import ArtifactError, SaevitError, TargetError, UsageError
from saevit_tvm.verbs import accuracy
from saevit_tvm.verbs.run import classes


def verify(
    path: Path,
    weights: str | None = None,
    device: str | None = None,
    *,
    data: Path | None = None,
    limit: int | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """The result; `passed` is false and `proof` "none" where this machine cannot run the artifact.

    With `device`, an address like rpc://HOST:PORT/KEY, the artifact runs there and not here. With `data`, pictures
    of known classes, it also tells how often the original and the artifact are right.
    """
    manifest = read_manifest(path)
    if limit is not None and data is None:
        raise UsageError("--limit is for pictures: give some with --data, or leave it out.")
    pictures = None if data is None else find(data, manifest["labels"], classes(path, manifest), limit)
    result: dict[str, Any] = {
        "artifact": str(path),
        "passed": False,
        "max_abs_error": None,
        "max_rel_error": None,
        "tolerance": parity.allowed(manifest),
        "proof": "none",
        "machine": None,
        "reference": None,
        "inputs": 0,
        "note": None,
        "data": None,
    }
    how, why = ("device", None) if device else _where_to_run(manifest, path)
    with workspace.scratch() as scratch:
        here = None
        if how is None:
            try:
                here = _stood_in(manifest, path, weights, scratch)
            except SaevitError as error:
                return result | {"note": f"{why} Its kernels are not run by this CPU: {error}"}
        if how is None and here is None:
            return result | {"note": why}
        inputs, expected, origin, note = reference(manifest, weights)
        if origin != "recorded":
            inputs, expected = parity.with_smaller(inputs, expected, batches(manifest)[:-1])

        def artifact(inputs: list[Inputs]) -> list[parity.Outputs]:
            if device:
                return on_device.answers(device, path, inputs, scratch)
            if here:
                return proof.answers(here.artifact, inputs, scratch, environment=here.environment)
            return proof.answers(path, inputs, scratch, how)

        answers = artifact(inputs)
        compared = None if pictures is None else _accuracy(pictures, manifest, weights, artifact, say)
    if origin == "recorded":
        answers = [parity.sample(outputs) for outputs in answers]
    deviation = parity.deviation(answers, expected)
    if here and here.proof is None:
        told = f"Its kernels, run by this CPU, deviate from {origin} by {deviation}, {result['tolerance']:.2g} allowed."
        arithmetic = {name: _finite(value) for name, value in deviation.entries.items()} | {"inputs": len(inputs)}
        return result | {"note": f"{why} {told}", "reference": origin, "arithmetic": arithmetic}
    return result | {
        "passed": deviation.within(result["tolerance"]),
        **{name: _finite(value) for name, value in deviation.entries.items()},
        "proof": here.proof if here else proof.kind(manifest["target"], how),
        "machine": _machine(manifest, device, how, here),
        "reference": origin,
        "inputs": len(inputs),
        "note": note,
        "data": compared,
    }


def _machine(manifest: dict[str, Any], device: str | None, how: str | None, here: StoodIn | None) -> str:
    if here:
        return here.machine
    return f"the device {device}" if device else proof.machine(manifest["target"], how)


def _stood_in(manifest: dict[str, Any], path: Path, weights: str | None, scratch: Path) -> StoodIn | None:
    """The same program for this CPU, made again from its recipe; None where there is no such thing."""
    if not backends.described(manifest).has_stand_in:
        return None
    from saevit_tvm.models.recreate import one_thread, recreate
    from saevit_tvm.tuning.records import open_records

    target = targets.get(manifest["target"]["name"]).computing_in(manifest["recipe"]["dtype"])
    with one_thread():
        *smaller, source = (recreate(_at(manifest, batch), weights) for batch in batches(manifest))
        records = open_records(None, target) if manifest["records"] else None
        compiled = backends.compile_model(
            source, target, records=records, dtype=manifest["recipe"]["dtype"], smaller=smaller
        )
    return stand_in.made(manifest, compiled, scratch, artifact=path)


def _at(manifest: dict[str, Any], batch: int) -> dict[str, Any]:
    recipe = manifest["recipe"]
    return manifest if recipe["batch"] == batch else manifest | {"recipe": recipe | {"batch": batch}}


def _accuracy(
    pictures: Pictures,
    manifest: dict[str, Any],
    weights: str | None,
    artifact: Callable[[list[Inputs]], list[parity.Outputs]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Beside the model itself: answers that were recorded know nothing of pictures."""
    from saevit_tvm.models.recreate import recreate

    source = recreate(manifest, weights)
    return accuracy.compare(
        pictures,
        manifest,
        lambda batches: [source.reference(x)[0] for x in batches],
        lambda batches: [outputs[0] for outputs in artifact([(x,) for x in batches])],
        say,
    )


def _where_to_run(manifest: dict[str, Any], path: Path) -> tuple[str | None, str | None]:
    """Where the artifact can be run from here ("host", "qemu"), or why nowhere."""
    target = manifest["target"]
    try:
        if target["arch"] == platform.machine() or "emulator" not in target:
            check_runnable(manifest, path)
            return "host", None
        from saevit_tvm.emulators import qemu

        lacking = qemu.missing(target["arch"])
        if lacking:
            return None, f"'{path}' is built for {target['arch']} and cannot be run under qemu here: {lacking}."
        qemu.foreign_runtime(target["arch"])
        return "qemu", None
    except (ArtifactError, TargetError) as error:
        return None, str(error)


def reference(
    manifest: dict[str, Any], weights: str | None
) -> tuple[list[Inputs], list[parity.Outputs], str, str | None]:
    """Inputs, what is expected for them, where that comes from, and why it is not PyTorch itself."""
    specs = specs_of(manifest["inputs"])
    try:
        from saevit_tvm.models.recreate import one_thread, oracle, recreate

        source = recreate(manifest, weights)
        inputs = parity.random_inputs(specs)
        with one_thread():
            return inputs, [source.reference(*each) for each in inputs], oracle(source), None
    except (SaevitError, ImportError) as error:
        if weights is not None:  # the user has asked for this comparison
            raise
        kept = manifest["reference"]
        if kept is None:
            raise SaevitError(f"nothing to compare with: {error}") from error
        return (
            parity.random_inputs(specs, kept["n"], kept["seed"]),
            parity.recorded(manifest),
            "recorded",
            str(error),
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
