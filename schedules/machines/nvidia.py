"""NVIDIA's GPUs as data, by compute capability: the limits of a kernel, and the figures of one chip each for models.

Limits are those that NVIDIA states in the CUDA C++ Programming Guide (compute capabilities, technical specifications)
and, for programs, in its CUDA Core Compute Libraries (`cuda::arch_traits`, libcudacxx/include/cuda/__device/
arch_traits.h), from which each was checked. Chips are as their datasheets have them, clocks at their boost.

A block is what OpenCL calls a work-group, a thread a work-item. A block may take all registers of a multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass

KILO = 1024
WARP = 32
RESERVED_BYTES = 1024  # of shared memory, that the system takes of every block since compute capability 8.0
REGISTER_UNIT = 8  # a thread's registers are given out in multiples of these: 256 a warp


@dataclass(frozen=True)
class Architecture:
    """`sm` as compilers spell it; `tensor_cores` are the arithmetics that these take.

    `shared_bytes` is what a block has without asking for more, `shared_memory` what a multiprocessor has for all of
    its blocks.
    """

    sm: str
    summary: str
    shared_memory: int
    tensor_cores: tuple[str, ...] = ("tf32", "float16", "bfloat16")
    registers: int = 64 * KILO
    registers_per_thread: int = 255
    threads: int = 1024
    shared_bytes: int = 48 * KILO

    @property
    def number(self) -> int:
        return int(self.sm.removeprefix("sm_"))

    @property
    def overlaps(self) -> bool:
        """Whether a kernel can be launched while the one before it still runs (programmatic dependent launch)."""
        return self.number >= 90

    @property
    def reserved_bytes(self) -> int:
        return RESERVED_BYTES if self.number >= 80 else 0


ARCHITECTURES = {
    each.sm: each
    for each in (
        Architecture("sm_75", "Turing (T4, RTX 20)", 64 * KILO, tensor_cores=("float16",)),
        Architecture("sm_80", "Ampere (A100, A30)", 164 * KILO),
        Architecture("sm_86", "Ampere (A10, A40, RTX 30)", 100 * KILO),
        Architecture("sm_87", "Ampere (Jetson Orin)", 164 * KILO),
        Architecture("sm_89", "Ada (L4, L40, RTX 40)", 100 * KILO),
        Architecture("sm_90", "Hopper (H100, H200)", 228 * KILO),
        Architecture("sm_100", "Blackwell (B100, B200)", 228 * KILO),
    )
}


@dataclass(frozen=True)
class Chip:
    """One GPU of an architecture: multiprocessors, float32 multiply-adds that each starts in a clock, rates.

    `tensor` are the multiply-adds of float16 that its tensor cores start in a clock; of tf32 they start half as many.
    """

    name: str
    sm: str
    multiprocessors: int
    clock_mhz: int
    lanes: int
    tensor: int
    gigabytes_per_second: float


# fmt: off
CHIPS = (
    Chip("t4", "sm_75", 40, clock_mhz=1590, lanes=64, tensor=512, gigabytes_per_second=320),
    Chip("a100", "sm_80", 108, clock_mhz=1410, lanes=64, tensor=1024, gigabytes_per_second=2039),
    Chip("a10", "sm_86", 72, clock_mhz=1695, lanes=128, tensor=512, gigabytes_per_second=600),
    Chip("agx-orin", "sm_87", 16, clock_mhz=1300, lanes=128, tensor=1024, gigabytes_per_second=204.8),
    Chip("l4", "sm_89", 58, clock_mhz=2040, lanes=128, tensor=512, gigabytes_per_second=300),
    Chip("h200", "sm_90", 132, clock_mhz=1980, lanes=128, tensor=2048, gigabytes_per_second=4800),
    Chip("b200", "sm_100", 148, clock_mhz=1965, lanes=128, tensor=4096, gigabytes_per_second=8000),
)
# fmt: on
