"""The whole street on small models: right answers, regions as single kernels, and the same result every time."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from saevit_tvm import targets
from saevit_tvm.backends import compile_model, kernels_to_tune
from saevit_tvm.compiler.street import Compiled
from saevit_tvm.models.opening import ModelSource, open_model
from saevit_tvm.support.errors import UsageError


def outputs(compiled: Compiled, x: np.ndarray) -> list[np.ndarray]:
    result = relax.VirtualMachine(compiled.executable, tvm.cpu())["main"](tvm.runtime.tensor(x))
    return [out.numpy() for out in ([result] if hasattr(result, "numpy") else result)]


def deviation(source: ModelSource, compiled: Compiled) -> float:
    x = np.random.RandomState(7).standard_normal(source.input_shape).astype("float32")
    pairs = zip(outputs(compiled, x), source.reference(x), strict=True)
    return max(float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())) for ours, theirs in pairs)


def right(source: ModelSource, compiled: Compiled) -> bool:
    assert compiled.regions == {name: {"found": 4, "expected": 4} for name in ("saa", "ciffn", "dwsconv")}
    assert compiled.warnings == []
    return deviation(source, compiled) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 64, "batch": 3},
        {"image_size": 96, "features_only": True},
        {"image_size": 57},  # no sampling rate divides it: windows at the border are partly filled
        {"image_size": 224, "num_classes": 3},
    ],
    ids=str,
)
def test_computes_what_pytorch_computes(options: dict) -> None:
    source = open_model("saevit_micro", **options)
    assert right(source, compile_model(source, targets.native()))


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Compiled, Path]:
    """The smallest model, and the folder of its phases."""
    folder = tmp_path_factory.mktemp("dump") / "ir"
    return compile_model(open_model("saevit_micro", image_size=64), targets.native(), dump_ir=folder), folder


@pytest.fixture(scope="module")
def micro(dumped: tuple[Compiled, Path]) -> Compiled:
    return dumped[0]


@pytest.mark.slow
def test_one_picture_gives_what_pytorch_gives(micro: Compiled) -> None:
    assert right(open_model("saevit_micro", image_size=64), micro)


def test_every_region_is_one_generated_kernel_and_nothing_else_is_left(micro: Compiled) -> None:
    assert micro.regions["saa"] == {"found": 4, "expected": 4}
    # Twelve blocks, five convolutions and the head.
    assert micro.kernels == {"total": 18, "tuned": 0, "scheduled": 18, "fallback": 0}
    assert micro.warnings == []


def test_an_inference_uses_memory_that_was_planned_and_copies_nothing(micro: Compiled) -> None:
    main = micro.executable.as_text().split("@main:")[1].split("\n@")[0]
    called = [line.split()[1] for line in main.splitlines() if line.strip().startswith("call")]
    kernels = [re.sub(r"\d+$", "", name) for name in called if not name.startswith("vm.")]
    assert set(kernels) == {"conv", "dwsconv", "saa", "ciffn", "head"}
    assert len(kernels) == called.count("vm.builtin.alloc_tensor") == 18
    # Two that every map takes turns in, a smaller one for the last stage, and the output.
    assert called.count("vm.builtin.alloc_storage") <= 4


@pytest.mark.slow
def test_blocks_of_one_shape_share_one_kernel() -> None:
    kernels = kernels_to_tune(open_model("saevit_xs", image_size=64), targets.native())
    blocks = [kernel.weight for kernel in kernels if kernel.name.startswith(("saa", "ciffn", "dwsconv"))]
    assert sorted(blocks) == sorted(3 * [1, 2, 4, 2])


def test_every_phase_can_be_dumped(dumped: tuple[Compiled, Path]) -> None:
    folder = dumped[1]
    files = sorted(path.name for path in folder.iterdir())
    phases = ["import", "simplify", "regions", "layout", "kernels", "schedules", "library"]
    assert files == [f"{number}-{phase}.py" for number, phase in enumerate(phases)]
    assert "batch_norm" in (folder / "0-import.py").read_text()
    assert "batch_norm" not in (folder / "1-simplify.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x86-64-v3", "x86-64-v4"])
def test_portable_targets_use_the_vectors_they_promise(name: str, tmp_path: Path) -> None:
    compiled = compile_model(open_model("saevit_micro", image_size=64), targets.get(name))
    compiled.export(tmp_path / "library.so")
    command = ["objdump", "--disassemble", "--no-show-raw-insn", tmp_path / "library.so"]
    assembly = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "vfmadd" in assembly
    assert ("%zmm" in assembly) == (name == "x86-64-v4")


def test_another_dtype_is_refused_in_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"'rpi4' cannot compute in float16: give --dtype float32, or"):
        compile_model(open_model("saevit_micro", image_size=64), targets.get("rpi4"), dtype="float16")
