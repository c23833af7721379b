"""GPUs as data: what each may be asked for, and what its makers say that it can do.

Limits decide which kernels may be made. The rest (cores, clock, rates) is for models of time only; it is of one chip
that has the GPU, named with it. Sources: Arm's GPU datasheet for Mali (warp width, threads and operations a core);
for Adreno, whose maker publishes little, the open driver in Mesa (registers, local memory, processors) and the rates
that are generally quoted. Bandwidth is that of the chip's memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from schedules.machines.nvidia import ARCHITECTURES, CHIPS, KILO, WARP, Chip


@dataclass(frozen=True)
class Limits:
    """What a kernel may take for granted of a device.

    `wave` is the work-group that fills it: how many work-items run in lockstep, or a few times that. A work-group
    shares the `registers` of a core, 32 bits each; `local_is_fast` where local memory is more than main memory by
    another name; `half` where arithmetic in float16 (cl_khr_fp16) is there, and twice as fast. `texels`, four numbers
    each, is the largest image over a buffer of weights, where reading through images may pay. `tensor_cores` are the
    arithmetics in which the work-items of a warp multiply small matrices together. `overlaps` where a kernel may be
    launched while the one before it still runs.
    """

    work_group: int
    local_bytes: int
    wave: int = 64
    registers: int = 16 * KILO
    registers_per_item: int = 64
    local_is_fast: bool = False
    half: bool = False
    texels: int = 0
    tensor_cores: tuple[str, ...] = ()
    overlaps: bool = False

    def excess(self, work_items: int, local_bytes: int, registers: int) -> str | None:
        """What a kernel wants and the device has not, in words."""
        wanted = [
            (work_items, self.work_group, "work-items in a work-group"),
            (local_bytes, self.local_bytes, "bytes of local memory"),
            (registers, self.registers_per_item, "registers a work-item"),
            (work_items * registers, self.registers, "registers a work-group"),
        ]
        return next((f"{want} {what}, of {have}" for want, have, what in wanted if want > have), None)


@dataclass(frozen=True)
class GPU:
    """A GPU as a chip has it. `warp` work-items run in lockstep, `fma` float32 multiply-adds start in a clock.

    `tensor` are those of float16 that tensor cores start.
    """

    name: str
    family: str
    chip: str
    cores: int
    clock_mhz: int
    fma: int
    warp: int
    gigabytes_per_second: float
    limits: Limits
    android: bool = True  # as phones have it, or the Linux of boards
    tensor: int = 0

    @property
    def gigaflops(self) -> float:
        return 2e-3 * self.fma * self.clock_mhz

    def tensor_gigaflops(self, dtype: str) -> float:
        return 2e-3 * self.tensor * self.clock_mhz / (2 if dtype == "tf32" else 1)


def _mali(
    name: str,
    chip: str,
    cores: int,
    clock: int,
    fma: int,
    warp: int,
    threads: int,
    bandwidth: float,
    android: bool = True,
) -> GPU:
    """A core runs all of its `threads` with 32 registers each, and half of them with 64, which is the most there are.

    So the largest work-group is half of a core's threads. Local memory is main memory, behind the same cache. Images
    have nothing to offer: by Arm's OpenCL guide the texture unit reads one texel a clock, and a buffer gives as many
    numbers to a load of four.
    """
    limits = Limits(threads // 2, 32 * KILO, wave=64, registers=32 * threads, registers_per_item=64, half=True)
    return GPU(name, "mali", chip, cores, clock, cores * fma, warp, bandwidth, limits, android)


def _adreno(name: str, chip: str, cores: int, clock: int, fma: int, vectors: int, bandwidth: float) -> GPU:
    """A register file of so many vectors of four for each of 128 work-items, a work-item takes at most 48 of them.

    Reads of images go through the texture units, which have a cache of their own that reads of buffers pass by:
    Qualcomm's advice for OpenCL is to prefer them, and its kernels in llama.cpp read weights like that, too. The
    largest image over a buffer is what drivers of all these GPUs state.
    """
    limits = Limits(
        work_group=1024,
        local_bytes=32 * KILO,
        wave=128,
        registers=vectors * 4 * 128,
        registers_per_item=48 * 4,
        local_is_fast=True,
        half=True,
        texels=1 << 27,
    )
    return GPU(name, "adreno", chip, cores, clock, fma, 64, bandwidth, limits)


# fmt: off
GPUS = (
    _mali("mali-g52", "S922X", 2, clock=800, fma=24, warp=8, threads=768, bandwidth=10.6, android=False),
    _mali("mali-g57", "Genio 1200", 5, clock=880, fma=32, warp=16, threads=1024, bandwidth=34.1, android=False),
    _mali("mali-g610", "RK3588", 4, clock=1000, fma=64, warp=16, threads=2048, bandwidth=33.8, android=False),
    _mali("mali-g78", "Exynos 2100", 14, clock=854, fma=32, warp=16, threads=1024, bandwidth=51.2),
    _mali("mali-g710", "Dimensity 9000", 10, clock=850, fma=64, warp=16, threads=2048, bandwidth=60.0),
    _mali("immortalis-g715", "Dimensity 9200", 11, clock=981, fma=128, warp=16, threads=2048, bandwidth=68.3),
    _adreno("adreno-630", "Snapdragon 845", 2, clock=710, fma=512, vectors=96, bandwidth=29.9),
    _adreno("adreno-650", "Snapdragon 865", 3, clock=587, fma=1024, vectors=64, bandwidth=44.0),
    _adreno("adreno-730", "Snapdragon 8 Gen 1", 4, clock=818, fma=1024, vectors=96, bandwidth=51.2),
    _adreno("adreno-740", "Snapdragon 8 Gen 2", 6, clock=680, fma=1536, vectors=96, bandwidth=67.2),
    # Its registers are not known yet: taken to be those of the 740.
    _adreno("adreno-830", "Snapdragon 8 Elite", 6, clock=1100, fma=1536, vectors=96, bandwidth=84.8),
)
# fmt: on


def common(limits: Sequence[Limits]) -> Limits:
    """What all of these have."""
    return Limits(
        work_group=min(each.work_group for each in limits),
        local_bytes=min(each.local_bytes for each in limits),
        wave=limits[0].wave,
        registers=min(each.registers for each in limits),
        registers_per_item=min(each.registers_per_item for each in limits),
        local_is_fast=all(each.local_is_fast for each in limits),
        half=all(each.half for each in limits),
        texels=min(each.texels for each in limits),
    )


# The work-group and local memory that all GPUs of the last ten years have, and no arithmetic in float16.
GENERIC = Limits(work_group=256, local_bytes=16 * KILO)

LIMITS: Mapping[str, Limits] = {
    "generic-opencl": GENERIC,
    **{family: common([gpu.limits for gpu in GPUS if gpu.family == family]) for family in ("mali", "adreno")},
    **{gpu.name: gpu.limits for gpu in GPUS},
}


CUDA_LIMITS: dict[str, Limits] = {
    sm: Limits(
        work_group=each.threads,
        local_bytes=each.shared_bytes,
        wave=4 * WARP,
        registers=each.registers,
        registers_per_item=each.registers_per_thread,
        local_is_fast=True,
        half=True,
        tensor_cores=each.tensor_cores,
        overlaps=each.overlaps,
    )
    for sm, each in ARCHITECTURES.items()
}


def _nvidia(chip: Chip) -> GPU:
    """Local memory is that of a multiprocessor, which its blocks share: no block may have all of it."""
    limits = replace(CUDA_LIMITS[chip.sm], local_bytes=ARCHITECTURES[chip.sm].shared_memory)
    fma = chip.multiprocessors * chip.lanes
    return GPU(
        name=chip.name,
        family=chip.sm,
        chip=chip.sm,
        cores=chip.multiprocessors,
        clock_mhz=chip.clock_mhz,
        fma=fma,
        warp=WARP,
        gigabytes_per_second=chip.gigabytes_per_second,
        limits=limits,
        android=False,
        tensor=chip.multiprocessors * chip.tensor,
    )


CUDA_GPUS = tuple(map(_nvidia, CHIPS))


def limits_of(target: Mapping[str, Any]) -> Limits:
    """The limits of a device, by TVM's description of the target."""
    return LIMITS[str(target["device"])] if "device" in target else CUDA_LIMITS[str(target["arch"])]
