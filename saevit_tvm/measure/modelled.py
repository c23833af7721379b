"""bench --emulated for GPUs: what one inference asks of them, by the compiled kernels. A model, with no GPU in sight.

A launch takes as long as its arithmetic or its memory traffic, whichever is longer, at the rates that the makers
state, those of tensor cores for what is computed there: every tensor moved once, no time between launches, and lanes
without work counted as lost. Real times are longer; what the model is good for is comparing kernels, and saying which
of the rates they meet first.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from saevit_tvm.runtime.artifact import read_manifest
from saevit_tvm.support.errors import ArtifactError
from schedules.machines.gpus import CUDA_GPUS, GPU, GPUS

KIND = "modelled from the compiled kernels and the GPUs' public figures: not a time"
SUMS = ("float_ops", "bytes", "bytes_loaded", "bytes_stored")


def modelled(path: Path) -> dict[str, Any]:
    """Launches, work and memory traffic of one inference, and what the rooflines of GPUs say to it."""
    manifest = read_manifest(path)
    rows = manifest.get("launches")
    if rows is None:
        raise ArtifactError(f"'{path}' says nothing of its launches: build it again with this version.")
    gpus = _gpus(manifest)
    return {
        "artifact": str(path),
        "model": manifest["model"],
        "target": manifest["target"]["name"],
        "dtype": manifest["dtype"],
        "kind": KIND,
        "launches": sum(row["calls"] for row in rows),
        "launches_with_images": sum(row["calls"] for row in rows if row.get("images")),
        **{name: sum(row["calls"] * row[name] for row in rows) for name in SUMS},
        "devices": [_device(gpu, rows, manifest["dtype"]) for gpu in gpus],
        "kernels": [row | {"on": {gpu.name: _launch(gpu, row, manifest["dtype"]) for gpu in gpus}} for row in rows],
    }


def _gpus(manifest: dict[str, Any]) -> list[GPU]:
    """The GPU that the artifact was built for, those of its family or architectures, or all."""
    if code := manifest.get("device_code"):
        return [gpu for gpu in CUDA_GPUS if gpu.family in code["architectures"]]
    target = manifest["target"]
    name = target["tvm"].get("device", target["name"])
    named = [gpu for gpu in GPUS if name in (gpu.name, gpu.family)]
    return named or list(GPUS)


def _device(gpu: GPU, rows: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    launches = [(row["calls"], _launch(gpu, row, dtype)) for row in rows]
    total = sum(calls * each["us"] for calls, each in launches)
    return {
        "name": gpu.name,
        "family": gpu.family,
        "chip": gpu.chip,
        "gigaflops": gpu.gigaflops,
        "gigabytes_per_second": gpu.gigabytes_per_second,
        "roofline_ms": 1e-3 * total,
        "memory_bound": sum(calls for calls, each in launches if each["bound"] == "memory"),
        "occupancy": sum(calls * each["us"] * each["occupancy"] for calls, each in launches) / total,
    }


def _launch(gpu: GPU, row: dict[str, Any], dtype: str) -> dict[str, Any]:
    """One launch on one GPU; `occupancy` is the share of its lanes that have work, in time as in space."""
    items, groups = math.prod(row["group"]), math.prod(row["grid"])
    lanes = items / (math.ceil(items / gpu.warp) * gpu.warp)
    cores = groups / (math.ceil(groups / gpu.cores) * gpu.cores)
    on_tensor_cores = row.get("tensor_ops", 0)
    arithmetic = 1e-3 * (row["float_ops"] - on_tensor_cores) / (gpu.gigaflops * lanes * cores)
    if on_tensor_cores:
        arithmetic += 1e-3 * on_tensor_cores / (gpu.tensor_gigaflops(dtype) * cores)
    memory = 1e-3 * row["bytes"] / gpu.gigabytes_per_second
    by_registers = gpu.limits.registers // (items * row["registers"])
    by_memory = gpu.limits.local_bytes // row["local_bytes"] if row["local_bytes"] else by_registers
    return {
        "us": max(arithmetic, memory),
        "bound": "arithmetic" if arithmetic > memory else "memory",
        "occupancy": lanes * cores,
        "groups_a_core": min(by_registers, by_memory),
    }
