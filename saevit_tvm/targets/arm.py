"""64-bit ARM: the boards, servers and phones that can be built for. Adding one is adding an entry.

`emulator` is the nearest model that qemu 7.2 has. It lends its features, not its speed: what a model runs
uses no instruction that the model lacks.
"""

from __future__ import annotations

from typing import Any

from saevit_tvm.support.toolchain import LINKERS
from saevit_tvm.targets.base import Target, dtypes_with

V8 = ("asimd", "fp")
V8_2 = (*V8, "asimddp", "asimdhp", "asimdrdm", "atomics", "lrcpc")
V8_6 = (*V8_2, "asimdfhm", "bf16", "fcma", "i8mm", "jscvt")
V8_4_SVE = (*V8_6, "sve")


def _linux(name: str, summary: str, features: tuple[str, ...], emulator: str, **tvm: Any) -> Target:
    """A board or a server that runs Linux."""
    return Target(
        name=name,
        summary=summary,
        tvm={"kind": "llvm", "mtriple": "aarch64-linux-gnu"} | tvm,
        arch="aarch64",
        features=features,
        dtypes=dtypes_with(features),
        emulator=emulator,
        linkers=LINKERS["aarch64"],
    )


def _android(name: str, summary: str, features: tuple[str, ...], emulator: str, **tvm: Any) -> Target:
    """A phone.

    Zig has no libraries of Android's, so what little of a libc kernels call comes along; only TVM's own symbol is
    left open. Pages of 16 KB are what newer phones have.
    """
    return Target(
        name=name,
        summary=summary,
        tvm={"kind": "llvm", "mtriple": "aarch64-linux-android"} | tvm,
        arch="aarch64",
        features=features,
        dtypes=dtypes_with(features),
        emulator=emulator,
        linkers=("zig",),
        link_flags=("-nostdlib", "-rtlib=compiler-rt", "-s", "-Wl,-z,max-page-size=16384"),
    )


_FOUR_CORES = {"num-cores": 4}

ARM_TARGETS = (
    _linux("arm64", "any 64-bit ARM Linux (armv8-a)", V8, "cortex-a53", mattr=["+neon"]),
    _linux("rpi4", "Raspberry Pi 4 (Cortex-A72)", V8, "cortex-a72", mcpu="cortex-a72", **_FOUR_CORES),
    _linux("rpi5", "Raspberry Pi 5 (Cortex-A76)", V8_2, "cortex-a76", mcpu="cortex-a76", **_FOUR_CORES),
    _linux("graviton3", "AWS Graviton3 (Neoverse V1)", V8_4_SVE, "max", mcpu="neoverse-v1"),
    _linux("jetson-orin-cpu", "the CPU of a Jetson Orin (Cortex-A78AE)", V8_2, "cortex-a76", mcpu="cortex-a78ae"),
    _android("android-arm64", "any 64-bit ARM Android (armv8-a)", V8, "cortex-a53", mattr=["+neon"]),
    # Without SVE, which the phones of some makers switch off.
    _android("phone-cortex-x4", "phones with a Cortex-X4", V8_6, "max", mcpu="cortex-x4", mattr=["-sve"]),
    Target(
        name="apple-silicon",
        summary="Macs with an M1 or later: object files, to be linked on a Mac",
        tvm={"kind": "llvm", "mtriple": "arm64-apple-macos", "mcpu": "apple-m1"},
        arch="arm64",
        linkers=(),
        output="objects",
        dtypes=dtypes_with(V8_2),
    ),
)
