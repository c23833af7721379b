"""Metal and WebGPU: sources and object files, checked for their form and run by nobody here."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from saevit_tvm import backends, targets
from saevit_tvm.backends import source as sources
from saevit_tvm.runtime import elf
from saevit_tvm.support.errors import CompileError
from saevit_tvm.verbs.build import BuildOptions, build

OBJECTS = {"metal": ("Mach-O", "object file", "arm64"), "webgpu": ("WebAssembly", "object file", "wasm32")}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTS)
def test_the_kernels_are_text_beside_the_host_part(name: str, tmp_path: Path) -> None:
    said: list[str] = []
    options = BuildOptions(model="saevit_micro", image_size=32, target=name, out=tmp_path, name="micro")
    result = build(options, say=said.append)
    assert result.manifest["verification"]["proof"] == "none" and not result.manifest["verification"]["passed"]
    assert any(line.startswith("not verified:") and "proven on such a machine" in line for line in said)
    with tarfile.open(result.artifact) as tar:
        tar.extractall(tmp_path / "out")
    assert {elf.read(path) for path in (tmp_path / "out").glob("*.o")} == {OBJECTS[name]}
    suffix = sources.LANGUAGES[name].suffix
    written = {path.stem: path.read_text() for path in (tmp_path / "out" / "kernels").glob(f"*.{suffix}")}
    assert set(written) == {row["kernel"] for row in result.manifest["launches"]}
    assert (tmp_path / "out" / "manifest.json").read_bytes() == result.manifest_path.read_bytes()
    if name == "webgpu":  # the work-group is in the source: it is the one that the manifest tells of
        for row in result.manifest["launches"]:
            assert f"@workgroup_size({', '.join(map(str, row['group']))})" in written[row["kernel"]]


@pytest.mark.parametrize("name", OBJECTS)
def test_they_say_that_they_are_not_run_here(name: str) -> None:
    target = targets.get(name)
    assert "not run here" in target.summary and backends.how_to_run(target) is None
    assert name in targets.names()


WGSL = """// Function: work_kernel
//----------------------------------------
// Function: work_kernel
//----------------------------------------
@group(0) @binding(0) var<storage, read_write> out : array<f32>;

@compute @workgroup_size(32, 1, 1)
fn work_kernel(
  @builtin(local_invocation_id) threadIdx : vec3<u32>
) {
  out[0] = 1.0f;
}
"""


def test_a_source_of_the_known_form_is_split() -> None:
    second = WGSL.replace("work_kernel", "work_kernel_1")
    assert list(sources.split(f"{WGSL}\n\n{second}", "webgpu")) == ["work_kernel", "work_kernel_1"]


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("fn work_kernel", "fn other_kernel", "does not define that kernel"),
        ("@compute ", "", "does not define that kernel"),
        ("1.0f;\n}", "1.0f;\n", "has unbalanced brackets"),
        ("@group(0)", "@group(0) var<storage>" * 8 + "@group(0)", "binds 9 buffers, of 8"),
        ("// Function", "// Kernel", "another form"),
    ],
)
def test_a_source_of_another_form_is_refused(before: str, after: str, fault: str) -> None:
    with pytest.raises(CompileError, match=fault):
        sources.split(WGSL.replace(before, after), "webgpu")
