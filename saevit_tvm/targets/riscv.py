"""64-bit RISC-V as every Linux distribution for it assumes: rv64gc, floating point in registers, no vectors.

The generators write four lanes and LLVM makes scalars of them: right, and no faster than scalar code can be.
"""

from __future__ import annotations

from saevit_tvm.support.toolchain import LINKERS
from saevit_tvm.targets.base import Target

RISCV_TARGETS = (
    Target(
        name="riscv64",
        summary="any 64-bit RISC-V Linux (rv64gc)",
        tvm={
            "kind": "llvm",
            "mtriple": "riscv64-linux-gnu",
            "mabi": "lp64d",
            "mattr": ["+m", "+a", "+f", "+d", "+c"],
        },
        arch="riscv64",
        emulator="rv64",
        linkers=LINKERS["riscv64"],
    ),
)
