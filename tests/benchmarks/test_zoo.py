"""What the zoo's table says of speeds: floors, shares of them, and who is behind."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from saevit_tvm.backends import nvrtc
from saevit_tvm.emulators import cuda as emulated
from saevit_tvm.runtime import opencl

MILLION = 10**6


def row(model: str, ours: float, **others: float) -> dict:
    """At a peak of 100 GFLOP/s a floor of 2 ms."""
    timed = {"saevit-tvm": ours, **others}
    speed = [
        {"name": name, "threads": 1, "median_ms": ms, "ratio": ours / ms, "peak_gflops": 100.0}
        for name, ms in timed.items()
    ]
    facts = {"variant": "plain", "input": "1x3x8x8", "seconds": 1.0, "kernels": 2, "rules": 1, "max_rel_error": 1e-6}
    left = {"left_multiply_adds": 0.013, "left_time": None}
    return {"model": f"timm:{model}", **facts, "multiply_adds": 100 * MILLION, **left, "speed": speed}


def test_speeds_stand_beside_the_floor(script) -> None:
    zoo = script("zoo")
    rows = [row("fast", 4.0, ncnn=8.0, onnxruntime=16.0), row("near", 2.4, ncnn=2.0), row("slow", 8.0, ncnn=4.0)]
    rows[2]["speed"].append({"name": "onnxruntime", "threads": 1, "error": "it cannot"})
    header, _, fast, near, slow, _, summary = zoo.table(rows).splitlines()
    assert header.endswith("| floor, 1 thread | ncnn, 1 thread | onnxruntime, 1 thread | saevit-tvm, 1 thread |")
    assert fast.endswith("| 1.3 % |  | 1 | 2.00 | 0.50 (25 %) | 0.25 (12 %) | 4.00 (50 %) |")
    assert near.endswith("| 2.00 | 1.20 (100 %) |  | 2.40 (83 %) |") and slow.endswith("| not measured | 8.00 (25 %) |")
    assert f"geometric mean of 3: {(0.5 * 1.2 * 2) ** (1 / 3):.2f}; behind" in summary
    assert summary.endswith("not within 1.25 of the floor: slow 2.00.")


def test_a_row_without_its_floor_is_measured_again(script) -> None:
    zoo = script("zoo")
    done, options = row("fast", 4.0, ncnn=8.0), type("Options", (), {"speed": True})
    assert zoo._is_done(done, options)
    del done["multiply_adds"]
    assert not zoo._is_done(done, options) and zoo.floor_ms(done, 1) is None


def test_the_peak_is_more_than_a_scalar_core_has(script) -> None:
    from saevit_tvm.targets import native

    assert script("peak").Peak(native().tvm).gflops(0.01) == pytest.approx(100, rel=0.98)


def test_for_gpus_each_model_is_built_for_each_in_both_types(script) -> None:
    zoo = script("zoo")
    options = argparse.Namespace(gpu=True, models=["mine.onnx"], draw=None, in_turn=False)
    jobs = list(zoo._jobs(options))
    assert len({job.key for job in jobs}) == len(jobs) == 8
    assert {(job.target, job.dtype) for job in jobs} == {
        (target, dtype)
        for target in ("generic-opencl", "mali", "adreno", "cuda-sm_90")
        for dtype in ("float32", "float16")
    }
    options.models, options.in_turn = [f"{at}.onnx" for at in range(8)], True
    in_turn = [(job.target, job.dtype) for job in zoo._jobs(options)]
    assert sorted(in_turn) == sorted((job.target, job.dtype) for job in jobs)
    facts = {"model": "mine.onnx", "proof": "none", "max_rel_error": None, "left_multiply_adds": 0.013, "seconds": 5.2}
    manifest = {"launches": [{"calls": 2, "bytes": 10**6}, {"calls": 1, "bytes": 10**5}]}
    manifest["verification"] = {"tolerance": 0.005, "arithmetic": {"max_rel_error": 0.002}}
    apart = {**facts, "variant": "mali float16", **zoo._launched({**manifest, "verification": {"tolerance": 0.005}})}
    ran = {**facts, "variant": "cuda-sm_90 float16", **zoo._launched(manifest)}
    failed = {"model": "mine.onnx", "variant": "adreno float16", "error": "it is too large"}
    _, _, *told = zoo.gpu_table([apart, ran, failed]).splitlines()
    assert told == [
        "| mine.onnx | mali float16 | not run here | 5e-03 | none | 3 | 2.1 | 1.3 % | 5 |",
        "| mine.onnx | cuda-sm_90 float16 | 2.0e-03 | 5e-03 | stand-in | 3 | 2.1 | 1.3 % | 5 |",
        "| mine.onnx | adreno float16 | does not build: it is too large |  |  |  |  |  |  |",
        "",
        "2 of 3 build; at the most 1.3 % of the multiply-adds are by rules.",
    ]


@pytest.mark.slow
def test_a_drawn_model_is_tuned_and_timed(script, run, tmp_path: Path) -> None:
    zoo = script("zoo")
    some = ["timm:test_vit", "timm:test_convnext", "timm:test_resnet"]
    (drawn,) = zoo._drawn([], argparse.Namespace(models=some, draw=1, seed=7))
    line = f"--speed --tune 0.1 --models {','.join(some)} --draw 1 --seed 7 --threads 1 --seconds 0.1"
    done = run("zoo.py", *line.split(), "--against", "onnxruntime", "--image-size", "32")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "zoo-tuned.json").read_text())
    assert (row["model"], row["variant"]) == (drawn, "tuned for 0.1 min") and row["trials"]["1"] > 0
    assert {each["name"] for each in row["speed"]} == {"saevit-tvm", "onnxruntime"}
    assert f"| {drawn.removeprefix('timm:')} | tuned for 0.1 min |" in (tmp_path / "zoo-tuned.md").read_text()


# Small, and of many kinds: one for each GPU and type, in that order.
SMALL = ("resnet", "vit", "byobnet", "convnext", "resnet", "efficientnet", "efficientnet_gn", "vit2")


@pytest.mark.slow
def test_models_build_for_gpus(run, tmp_path: Path) -> None:
    """Each is compared with PyTorch where this machine can."""
    models = ",".join(f"timm:test_{name}" for name in SMALL)
    done = run("zoo.py", "--gpu", "--in-turn", "--models", models)
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in json.loads((tmp_path / "zoo-gpu.json").read_text())}
    assert len(rows) == len(SMALL) and all(row["left_multiply_adds"] < 0.02 for row in rows.values())
    for variant, row in rows.items():
        with_opencl = opencl.available()[0] and opencl.devices()[0].proof == "pocl"
        lacking = (nvrtc.missing() or emulated.missing()) if variant.startswith("cuda") else not with_opencl
        assert lacking or 0 < row["max_rel_error"] < row["tolerance"], row
