"""64-bit ARM: the boards, servers and phones that can be built for. Adding one is adding an entry.

`emulator` is the nearest model that qemu 7.2 has. It lends its features, not its speed: what a model runs
uses no instruction that the model lacks.
"""

from __future__ import annotations

from typing import Any

from saevit_tvm.targets.base import Target, dtypes_with

LINKERS = ("aarch64-linux-gnu-gcc", "clang", "zig")

V8 = ("asimd", "fp")
V8_2 = (*V8, "asimddp", "asimdhp", "asimdrdm", "atomics", "lrcpc")
V8_4_SVE = (*V8_2, "asimdfhm", "bf16", "fcma", "i8mm", "jscvt", "sve")


def _linux(cpu: str | None, **more: Any) -> dict[str, Any]:
    return {"kind": "llvm", "mtriple": "aarch64-linux-gnu"} | ({"mcpu": cpu} if cpu else {}) | more


ARM_TARGETS = (
    Target(
        name="arm64",
        summary="any 64-bit ARM Linux (armv8-a)",
        tvm=_linux(None, mattr=["+neon"]),
        arch="aarch64",
        features=V8,
        emulator="cortex-a53",
        linkers=LINKERS,
    ),
    Target(
        name="rpi4",
        summary="Raspberry Pi 4 (Cortex-A72)",
        tvm=_linux("cortex-a72", **{"num-cores": 4}),
        arch="aarch64",
        features=V8,
        emulator="cortex-a72",
        linkers=LINKERS,
    ),
    Target(
        name="rpi5",
        summary="Raspberry Pi 5 (Cortex-A76)",
        tvm=_linux("cortex-a76", **{"num-cores": 4}),
        arch="aarch64",
        features=V8_2,
        dtypes=dtypes_with(V8_2),
        emulator="cortex-a76",
        linkers=LINKERS,
    ),
    Target(
        name="graviton3",
        summary="AWS Graviton3 (Neoverse V1)",
        tvm=_linux("neoverse-v1"),
        arch="aarch64",
        features=V8_4_SVE,
        dtypes=dtypes_with(V8_4_SVE),
        emulator="max",
        linkers=LINKERS,
    ),
    Target(
        name="jetson-orin-cpu",
        summary="the CPU of a Jetson Orin (Cortex-A78AE)",
        tvm=_linux("cortex-a78ae"),
        arch="aarch64",
        features=V8_2,
        dtypes=dtypes_with(V8_2),
        emulator="cortex-a76",
        linkers=LINKERS,
    ),
    Target(
        name="android-arm64",
        summary="any 64-bit ARM Android (armv8-a)",
        tvm={"kind": "llvm", "mtriple": "aarch64-linux-android", "mattr": ["+neon"]},
        arch="aarch64",
        features=V8,
        emulator="cortex-a53",
        linkers=("zig",),
        # Zig has no libraries of Android's, so what little of a libc kernels call comes along; only TVM's own symbol
        # is left open. Pages of 16 KB are what newer phones have.
        link_flags=("-nostdlib", "-rtlib=compiler-rt", "-s", "-Wl,-z,max-page-size=16384"),
    ),
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
