"""Models with several inputs and outputs, of whole numbers and halves, of any rank: built, run, verified, compared."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from saevit_tvm import backends, targets
from saevit_tvm.models.opening import open_model
from saevit_tvm.proof.parity import as_list, random_inputs
from saevit_tvm.runtime.engine import load
from saevit_tvm.runtime.tensors import TensorSpec
from saevit_tvm.support.errors import ArtifactError
from saevit_tvm.verbs.bench import bench
from saevit_tvm.verbs.build import BuildOptions, build
from saevit_tvm.verbs.run import run
from saevit_tvm.verbs.sdk import SdkOptions, sdk
from saevit_tvm.verbs.verify import verify

Cli = Callable[..., subprocess.CompletedProcess[str]]


class Seen(nn.Module):
    """A picture and where it was taken; classes and how sure, a map of decisions, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.places, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Embedding(10, 8), nn.Linear(20, 12)
        self.parts = nn.Conv2d(8, 5, 1)

    def forward(self, picture: torch.Tensor, place: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen = self.conv(picture.float() / 255).relu()
        known = torch.cat([seen.mean((2, 3)), self.places(place), numbers.float()], 1)
        scores, parts = self.head(known), self.parts(seen)
        sure, which = scores.topk(3)
        return scores.argmax(1), which, sure, parts.argmax(1).to(torch.uint8), parts[:, 0] > 0


class Half(nn.Module):
    """In halves on both sides; five dimensions."""

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return (volume.float().sum((2, 3)) * 0.1).to(torch.float16)


class Halves(nn.Module):
    """What TVM's own kernels do with halves: copied, doubled, added and made wider."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x * 2, x[:, :, ::2], torch.cat([x, x], 1), (x + x).relu().float().mean((2, 3)), x.float().exp().half()


class Gated(nn.Module):
    """Single numbers and decisions on both sides."""

    def forward(self, scale: torch.Tensor, keep: torch.Tensor, mask: torch.Tensor, x: torch.Tensor) -> tuple:
        seen = torch.where(mask, x * scale, torch.zeros(()))
        seen = torch.where(keep, seen, -seen)
        return seen.sum(), seen > 0, (seen > 0).any(), mask.sum()


SIZES = {"picture": (2, 3, 12, 16), "place": (2,), "numbers": (2, 4)}
GIVEN = (torch.zeros(2, 3, 12, 16, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 4))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seen") / "seen.pt2"
    torch.manual_seed(0)
    torch.export.save(torch.export.export(Seen().eval(), GIVEN), path)
    return path


@pytest.fixture(scope="module")
def artifact(seen: Path) -> Path:
    return build(BuildOptions(str(seen), out=seen.parent), lambda _line: None).artifact


@pytest.mark.slow
def test_inputs_go_in_by_position_or_by_name(seen: Path, artifact: Path) -> None:
    source, engine = open_model(str(seen)), load(artifact)
    assert {spec.name: spec.shape for spec in engine.inputs} == SIZES
    assert [spec.dtype for spec in engine.inputs] == ["uint8", "int64", "float32"]
    assert [spec.dtype for spec in engine.outputs] == ["int64", "int64", "float32", "uint8", "bool"]
    (given,) = random_inputs(engine.inputs, 1)
    expected = source.reference(*given)
    picture, place, numbers = given
    strided = numbers.repeat(2, 1)[:, ::2]  # from a memory that the library cannot use as it is
    torch_given = [torch.from_numpy(each) for each in given]
    for answer in (
        engine(*given),
        engine(picture, numbers=strided, place=place),
        [each.numpy() for each in engine(*torch_given)],
    ):
        for ours, theirs in zip(answer, expected, strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            assert np.abs(ours.astype(float) - theirs.astype(float)).max() < 1e-5


@pytest.mark.slow
def test_wrong_inputs_are_named(artifact: Path) -> None:
    engine = load(artifact)
    picture, place, numbers = (np.zeros(spec.shape, spec.dtype) for spec in engine.inputs)
    with pytest.raises(TypeError, match=r"takes 3 inputs \(picture, place, numbers\), and what is given is 1\."):
        engine(picture)
    with pytest.raises(TypeError, match="what is given is 2 and width"):
        engine(picture, place, width=numbers)
    with pytest.raises(ValueError, match=r"and 'place' must have shape \(2,\), dtype int64"):
        engine(picture, place.astype(np.int32), numbers)


@pytest.mark.slow
def test_places_that_are_in_no_table_do_no_harm(artifact: Path) -> None:
    engine = load(artifact)
    picture, _, numbers = (np.zeros(spec.shape, spec.dtype) for spec in engine.inputs)
    far, near = (engine(picture, np.array(place), numbers) for place in ([10**9, -(10**9)], [9, 0]))
    assert all(np.array_equal(a, b) for a, b in zip(far, near, strict=True))


@pytest.mark.slow
def test_it_is_verified_against_the_model_and_against_what_was_recorded(seen: Path, artifact: Path) -> None:
    for weights, origin in ((str(seen), "pytorch"), (None, "recorded")):
        found = verify(artifact, weights)
        assert found["passed"] and found["reference"] == origin
        assert found["flipped"] == 0 and found["decisions"] == found["inputs"] * (2 + 6 + 2 * 2 * 6 * 8)


@pytest.mark.slow
def test_other_runtimes_are_given_the_same(seen: Path, artifact: Path) -> None:
    found = bench(
        artifact,
        threads=1,
        against=["onnxruntime", "openvino", "ncnn"],
        runs=1,
        seconds=0.0,
        weights=str(seen),
        say=lambda _line: None,
    )
    assert [row["name"] for row in found["results"]] == ["saevit-tvm", "onnxruntime", "openvino"]
    assert [row["error"] for row in found["failed"]] == ["ncnn is compared on one input of float32 only"]


@pytest.mark.slow
def test_what_takes_one_picture_says_so(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"takes 2x3x12x16 uint8 and 2 int64 and .* not pictures: 'run' takes \.npy files"
    ):
        run(artifact, [tmp_path / "x.png"])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["rpi5", pytest.param("generic-opencl", marks=pytest.mark.slow)])
def test_other_targets_take_several_inputs(target: str, seen: Path, tmp_path: Path) -> None:
    if backends.how_to_run(targets.get(target)) is None:
        pytest.skip(backends.why_not(targets.get(target)))
    dtype = "float16" if target == "rpi5" else "float32"
    made = build(BuildOptions(str(seen), target, dtype=dtype, out=tmp_path), lambda _line: None)
    assert made.manifest["verification"]["passed"]
    assert [each["dtype"] for each in made.manifest["outputs"]] == ["int64", "int64", "float32", "uint8", "bool"]


@pytest.mark.slow
def test_halves_go_through_opencl_devices_that_cannot_compute_with_them(tmp_path: Path) -> None:
    if backends.how_to_run(targets.get("generic-opencl")) is None:
        pytest.skip(backends.why_not(targets.get("generic-opencl")))
    program = torch.export.export(Halves(), (torch.zeros(1, 3, 8, 6, dtype=torch.float16),))
    torch.export.save(program, tmp_path / "halves.pt2")
    made = build(BuildOptions(str(tmp_path / "halves.pt2"), "generic-opencl", out=tmp_path), lambda _line: None)
    assert made.manifest["verification"]["passed"]
    x = np.random.RandomState(1).randn(1, 3, 8, 6).astype(np.float16)
    doubled, thinned, *_ = load(made.artifact)(x)
    assert np.array_equal(doubled, x * 2) and np.array_equal(thinned, x[:, :, ::2])


@pytest.mark.slow
def test_halves_and_five_dimensions_go_in_from_python_and_c(tmp_path: Path) -> None:
    program = torch.export.export(Half(), (torch.zeros(1, 2, 3, 4, 5, dtype=torch.float16),))
    torch.export.save(program, tmp_path / "half.pt2")
    made = build(BuildOptions(str(tmp_path / "half.pt2"), out=tmp_path), lambda _line: None)
    assert made.manifest["verification"]["passed"]
    assert [made.manifest[side][0]["dtype"] for side in ("inputs", "outputs")] == ["float16", "float16"]
    kit = sdk(SdkOptions(made.artifact, tmp_path / "sdk", weights=str(tmp_path / "half.pt2")), say=lambda _line: None)
    assert kit["verification"]["static"]["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
def test_a_first_convolution_gets_its_numbers_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    """It reads the model's input as it lies where that is float32, and only there."""

    class Converted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.float()).relu()

    torch.manual_seed(0)
    program = torch.export.export(Converted().eval(), (torch.zeros(1, 3, 9, 8, dtype=dtype),))
    torch.export.save(program, tmp_path / "converted.pt2")
    made = build(BuildOptions(str(tmp_path / "converted.pt2"), out=tmp_path), lambda _line: None)
    assert made.manifest["verification"]["passed"]
    assert made.manifest["inputs"][0]["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.slow
def test_onnx_takes_several_inputs_of_several_batches_too(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.mean((2, 3)).argmax(1), x.flatten(1)[:, :3] * place[:, None]

    given = (torch.zeros(2, 4, 5, 6), torch.zeros(2, dtype=torch.int32))
    names = {"input_names": ["x", "place"], "dynamic_axes": {"x": {0: "n"}, "place": {0: "n"}}}
    torch.onnx.export(Two(), given, str(tmp_path / "two.onnx"), dynamo=False, **names)
    made = build(BuildOptions(str(tmp_path / "two.onnx"), batch=(1, 3), out=tmp_path), lambda _line: None)
    assert [(each["name"], each["shape"]) for each in made.manifest["inputs"]] == [("x", [3, 4, 5, 6]), ("place", [3])]
    assert made.manifest["verification"]["decisions"] == 10  # of three inferences, and of one row
    engine = load(made.artifact)
    x, place = np.random.RandomState(0).rand(5, 4, 5, 6).astype("float32"), np.arange(5, dtype="int32")
    for count in (1, 2, 5):
        most, product = engine(place=place[:count], x=x[:count])
        np.testing.assert_array_equal(most, x[:count].mean((2, 3)).argmax(1))
        np.testing.assert_allclose(product, x[:count, 0, 0, :3] * place[:count, None], rtol=1e-6)
    with pytest.raises(ValueError, match=r"has shape \(4,\), .* and 'place' must have shape \(5,\)"):
        engine(x, place[:4])
    rows = [[spec._replace(shape=(count, *spec.shape[1:])) for spec in engine.inputs] for count in (1, 2, 3, 5)]
    answered_from_c_as_from_python(made.artifact, tmp_path, rows)


@pytest.mark.slow
def test_single_numbers_and_decisions_go_in_and_out_of_python_the_command_line_and_c(tmp_path: Path, cli: Cli) -> None:
    given = (torch.tensor(1.5), torch.tensor(True), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3))
    torch.export.save(torch.export.export(Gated().eval(), given), tmp_path / "gated.pt2")
    made = build(BuildOptions(str(tmp_path / "gated.pt2"), out=tmp_path), lambda _line: None)
    source, engine = open_model(str(tmp_path / "gated.pt2")), load(made.artifact)
    assert [spec.shape for spec in engine.inputs] == [(), (), (2, 3), (2, 3)]
    for scale, keep, mask, x in random_inputs(engine.inputs, 4):
        expected = source.reference(scale, keep, mask, x)
        answer = engine(np.float32(scale), np.bool_(keep), mask, x)
        assert [(a.dtype, a.shape) for a in answer] == [(e.dtype, e.shape) for e in expected]
        np.testing.assert_allclose(answer[0], expected[0], rtol=1e-5)
        assert all(np.array_equal(a, e) for a, e in zip(answer[1:], expected[1:], strict=True))
    np.savez(tmp_path / "given.npz", scale=scale, keep=keep, mask=mask, x=x)
    done = cli("run", made.artifact, tmp_path / "given.npz", "--out", tmp_path / "answer.npz", "--json")
    told = json.loads(done.stdout)["outputs"]
    assert [(each["dtype"], each["shape"]) for each in told] == [(str(a.dtype), list(a.shape)) for a in answer]
    with np.load(tmp_path / "answer.npz") as kept:
        assert all(np.array_equal(kept[f"output{at}"], a) for at, a in enumerate(answer))
    answered_from_c_as_from_python(made.artifact, tmp_path, [engine.inputs])


@pytest.mark.slow
def test_arrays_that_do_not_fit_are_a_sentence(artifact: Path, tmp_path: Path, cli: Cli) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "bad.npy").write_bytes(b"no array")
    for arguments, words in (
        (["one.npy"], "takes 3 inputs (picture, place, numbers), and what is given is 1"),
        (["bad.npy"], "bad.npy' holds no arrays: write it with numpy.save"),
        (["none.npz"], "there is no array"),
        (["one.npy", "--top", "2"], "--top is for pictures"),
        (["one.png", "--out", "x.npz"], "--out is for the outputs of .npy files"),
    ):
        done = cli("run", artifact, tmp_path / arguments[0], *arguments[1:])
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def answered_from_c_as_from_python(artifact: Path, folder: Path, given_as: Sequence[Sequence[TensorSpec]]) -> None:
    """Both flavours, bit by bit, for inputs like these."""
    weights = folder / load(artifact).manifest["recipe"]["model"]
    kit = sdk(SdkOptions(artifact, folder / "sdk", "both", str(weights)), say=lambda _line: None)
    assert all(proof["passed"] for proof in kit["verification"].values())
    flags = "CFLAGS=-O1 -Werror -fsanitize=address,undefined -fno-sanitize-recover=all"
    programs = [folder / "sdk" / f"tensor-{flavour}" for flavour in kit["flavours"]]
    subprocess.run(["make", "-s", "-C", folder / "sdk", flags, *(program.name for program in programs)], check=True)
    engine, asked, answered = load(artifact), folder / "in", folder / "out"
    for specs in given_as:
        (given,) = random_inputs(specs, 1)
        asked.write_bytes(b"".join(array.tobytes() for array in given))
        expected = b"".join(array.tobytes() for array in as_list(engine(*given)))
        for program in programs:
            subprocess.run([program, asked, answered, "2", "0", folder / "sdk" / "lib" / artifact.name], check=True)
            assert answered.read_bytes() == expected, (program.name, specs)
