"""An artifact for another CPU, run for real: qemu stands in for the board."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saevit_tvm import backends, targets
from saevit_tvm.emulators import qemu
from saevit_tvm.models.opening import open_model
from saevit_tvm.proof import parity
from saevit_tvm.runtime.artifact import read_manifest, seal
from saevit_tvm.runtime.manifest import schema
from saevit_tvm.runtime.tensors import specs_of
from saevit_tvm.support.errors import ArtifactError, TargetError
from saevit_tvm.verbs.counted import emulated
from saevit_tvm.verbs.verify import verify

jsonschema = pytest.importorskip("jsonschema")
pytestmark = pytest.mark.skipif(
    backends.how_to_run(targets.get("rpi5")) != "qemu",
    reason="needs qemu-user and a cross compiler, and no ARM machine",
)


@pytest.fixture
def forged(rpi5_artifact: Path, tmp_path: Path) -> Callable[..., Path]:
    """The same artifact with another target in its manifest, or other code."""

    def make(code: bytes | None = None, **target: Any) -> Path:
        manifest = read_manifest(rpi5_artifact)
        library = tmp_path / "library.so"
        library.write_bytes(code or rpi5_artifact.read_bytes()[: manifest["size"]])
        manifest["target"] |= target
        seal(library, manifest, tmp_path / "forged.so")
        return tmp_path / "forged.so"

    return make


def run(artifact: Path, tmp_path: Path, **options: Any) -> list[np.ndarray]:
    inputs = parity.random_inputs(specs_of(read_manifest(artifact)["inputs"]), 1)
    return qemu.run(artifact, inputs, tmp_path, **options)[0]


@pytest.mark.slow
def test_it_is_proven_before_it_is_put_in_place(rpi5_artifact: Path) -> None:
    manifest = read_manifest(rpi5_artifact)
    proof = manifest["verification"]
    assert proof["passed"] and proof["proof"] == "qemu" and proof["machine"] == "qemu, cortex-a76 model"
    assert proof["max_abs_error"] < 2e-5 and proof["inputs"] == parity.INPUTS
    assert all(count["found"] == count["expected"] > 0 for count in manifest["regions"].values())
    assert manifest["kernels"]["scheduled"] == manifest["kernels"]["total"] > 0


def test_verify_runs_it_again(cli: Any, rpi5_artifact: Path) -> None:
    done = cli("verify", "--json", rpi5_artifact)
    result = json.loads(done.stdout)
    jsonschema.validate(result, schema("verify"))
    assert done.returncode == 0 and result["passed"] and result["proof"] == "qemu"
    assert result["machine"] == "qemu, cortex-a76 model" and result["max_abs_error"] < 2e-5


@pytest.mark.slow
def test_one_thread_and_many_answer_alike(rpi5_artifact: Path, tmp_path: Path) -> None:
    first, *others = (run(rpi5_artifact, tmp_path, threads=threads)[0] for threads in (1, 2, 4))
    assert all(np.array_equal(first, other) for other in others)


def test_a_cpu_that_lacks_features_refuses(rpi5_artifact: Path, forged: Callable[..., Path], tmp_path: Path) -> None:
    sentence = r"cannot be run on qemu's cortex-a53 model: it needs CPU features .*lacks: asimddp, asimdhp.*\.$"
    with pytest.raises(ArtifactError, match=sentence):
        run(rpi5_artifact, tmp_path, cpu="cortex-a53")
    with pytest.raises(ArtifactError, match=r"neoverse-n1 model: .*lacks: .*i8mm, jscvt, sve\.$"):
        run(forged(features=[*targets.get("graviton3").features], emulator="neoverse-n1"), tmp_path)


def test_a_model_that_qemu_lacks_is_a_sentence(forged: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"has no CPU model 'cortex-z99': its models are .*cortex-a76"):
        run(forged(emulator="cortex-z99"), tmp_path)


def test_code_that_crashes_is_a_sentence(rpi5_artifact: Path, forged: Callable[..., Path], tmp_path: Path) -> None:
    code = bytearray(rpi5_artifact.read_bytes()[: read_manifest(rpi5_artifact)["size"]])
    sections = subprocess.run(["readelf", "-S", "-W", rpi5_artifact], capture_output=True, text=True).stdout
    fields = next(line.split(".text")[1].split() for line in sections.splitlines() if " .text " in line)
    offset, size = int(fields[2], 16), int(fields[3], 16)
    code[offset : offset + size] = bytes(size)  # an instruction that is defined to be none
    with pytest.raises(ArtifactError, match=r"'forged.so' crashes on qemu's cortex-a76 model \(SIGILL\)"):
        run(forged(bytes(code)), tmp_path)


def test_the_wrong_weights_in_a_library_are_found_out(rpi5_artifact: Path, tmp_path: Path) -> None:
    manifest = read_manifest(rpi5_artifact)
    (tmp_path / "library.so").write_bytes(rpi5_artifact.read_bytes()[: manifest["size"]])
    other = open_model("saevit_micro", image_size=64, seed=1)
    manifest |= {"weights": other.weights, "weights_digest": other.weights_digest}
    seal(tmp_path / "library.so", manifest, tmp_path / "forged.so")
    result = verify(tmp_path / "forged.so")
    assert result["proof"] == "qemu" and not result["passed"] and result["max_abs_error"] > 1e-2


def test_a_cut_off_file_is_not_run(rpi5_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.so").write_bytes(rpi5_artifact.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match=r"cut\.so' carries no saevit-tvm manifest"):
        run(tmp_path / "cut.so", tmp_path)


def test_without_an_emulator_the_proof_is_none(cli: Any, rpi5_artifact: Path, tmp_path: Path) -> None:
    done = cli("verify", "--json", rpi5_artifact, env=os.environ | {"PATH": str(tmp_path)})
    result = json.loads(done.stdout)
    assert done.returncode == 1 and result["proof"] == "none" and not result["passed"]
    assert "apt install qemu-user" in result["note"]


def test_offline_without_a_runtime_the_proof_is_none(cli: Any, rpi5_artifact: Path, tmp_path: Path) -> None:
    alone = {"SAEVIT_TVM_CACHE": str(tmp_path / "cache"), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    done = cli("verify", "--json", rpi5_artifact, env=os.environ | alone)
    result = json.loads(done.stdout)
    assert done.returncode == 1 and result["proof"] == "none"
    assert "TVM's runtime for aarch64 cannot be downloaded" in result["note"]
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_bench_emulated(cli: Any, rpi5_artifact: Path, micro_artifact: Path) -> None:
    done = cli("bench", "--emulated", "--json", rpi5_artifact)
    result = json.loads(done.stdout)
    jsonschema.validate(result, schema("emulated"))
    assert "not a time" in result["kind"] and result["machine"] == "qemu, cortex-a76 model"
    assert sum(result["classes"].values()) == result["instructions"]
    assert result["classes"]["fma"] > 0.2 * result["instructions"]
    assert "not a time" in cli("bench", "--emulated", rpi5_artifact).stdout
    with pytest.raises(TargetError, match="leave out --emulated"):
        emulated(micro_artifact, lambda _line: None)


@pytest.mark.slow
def test_bench_emulated_of_two(cli: Any, rpi5_artifact: Path) -> None:
    """Where objects come to lie costs or saves a few instructions, so even a file is not quite like itself."""
    result = json.loads(cli("bench", "--emulated", "--json", rpi5_artifact, rpi5_artifact).stdout)
    jsonschema.validate(result, schema("emulated-pair"))
    first, second = result["artifacts"]
    jsonschema.validate(first, schema("emulated"))
    assert result["ratios"]["instructions"] == first["instructions"] / second["instructions"]
    assert list(result["ratios"]) == ["instructions", "bytes_loaded", "bytes_stored", "float_ops"]
    assert list(result["ratios"].values()) == pytest.approx([1] * 4, rel=0.01)


PROGRAM = """
int main(int argc, char** argv) {
  static float data[64] __attribute__((aligned(64)));
  const long turns = 1000L * (argv[1][0] - '0');
  for (long i = 0; i < turns; i++)
    __asm__ volatile("ldr q0, [%0]\\n ldp q1, q2, [%0]\\n ld1 {v3.4s, v4.4s}, [%0]\\n ld1r {v5.4s}, [%0]\\n"
                     "ldr w9, [%0]\\n ldrb w10, [%0]\\n"
                     "fmla v6.4s, v1.4s, v2.4s\\n fmla v7.4s, v1.4s, v2.s[1]\\n fmadd s8, s0, s1, s2\\n"
                     "fadd v9.4s, v1.4s, v2.4s\\n fmul v9.2d, v1.2d, v2.2d\\n add v9.4s, v1.4s, v2.4s\\n"
                     "fmul s9, s1, s2\\n fmla v9.8h, v1.8h, v2.8h\\n"
                     "str q0, [%0, #64]\\n stp x9, x10, [%0, #80]\\n strh w9, [%0, #96]" ::"r"(data)
                     : "x9", "x10", "memory");
  return 0;
}
"""


def test_the_counter_counts_known_instructions(tmp_path: Path) -> None:
    source, program = tmp_path / "known.c", tmp_path / "known"
    source.write_text(PROGRAM)
    compiler = qemu.compiler("aarch64")
    subprocess.run([*compiler, "-O1", "-march=armv8.2-a+fp16", str(source), "-o", str(program)], check=True)
    counts = []
    for times in (1, 2):
        out = tmp_path / f"{times}.json"
        subprocess.run(qemu.command("aarch64", "max", [program, str(times)], count=out), check=True)
        counts.append(json.loads(out.read_text()))
    # Both command lines are equally long, or else the loader would execute a few instructions more or fewer.
    each = {name: (counts[1][name] - counts[0][name]) / 1000 for name in counts[0]}
    assert each["fma"] == 4 and each["vector"] == 4 and each["load"] == 6 and each["store"] == 3
    assert each["bytes_loaded"] == 16 + 32 + 32 + 4 + 4 + 1 and each["bytes_stored"] == 16 + 16 + 2
    assert each["float_ops"] == 2 * (4 + 4 + 1 + 8) + 4 + 2 + 0 + 1
    assert each["branch"] == 1 and each["instructions"] == sum(each[name] for name in qemu.CLASSES)
