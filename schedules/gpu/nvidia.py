"""NVIDIA's GPUs as data, by compute capability: the limits of a kernel that the CUDA C++ Programming Guide states.

A block is what OpenCL calls a work-group, a thread a work-item. Shared memory is what a block has without asking for
more, the same on every GPU since the first; the registers are those of a multiprocessor, which one block may take.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
RESERVED_BYTES = 1024  # of shared memory, that the system takes of every block since compute capability 8.0


@dataclass(frozen=True)
class Architecture:
    """`sm` as compilers spell it; `tensor_tf32` where tensor cores take float32 with short mantissas."""

    sm: str
    summary: str
    tensor_tf32: bool = True
    registers: int = 65536
    registers_per_thread: int = 255
    threads: int = 1024
    shared_bytes: int = 48 * 1024

    @property
    def number(self) -> int:
        return int(self.sm.removeprefix("sm_"))


ARCHITECTURES = {
    each.sm: each
    for each in (
        Architecture("sm_75", "Turing (T4, RTX 20)", tensor_tf32=False),
        Architecture("sm_80", "Ampere (A100, A30)"),
        Architecture("sm_86", "Ampere (A10, A40, RTX 30)"),
        Architecture("sm_87", "Ampere (Jetson Orin)"),
        Architecture("sm_89", "Ada (L4, L40, RTX 40)"),
        Architecture("sm_90", "Hopper (H100, H200)"),
        Architecture("sm_100", "Blackwell (B100, B200)"),
    )
}
