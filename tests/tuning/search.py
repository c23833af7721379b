"""A short search over one small kernel, as a process that tests can kill: `search.py STORE TRIALS`."""

from __future__ import annotations

import sys
from pathlib import Path

from saevit_tvm.support.tvm_first import load_tvm_first

if __name__ == "__main__":
    load_tvm_first()  # as the command line does it

from saevit_tvm import targets
from saevit_tvm.compiler.street import TunableKernel
from saevit_tvm.tuning.session import Session, Snapshot
from saevit_tvm.tuning.store import Store


def matmul(rows: int = 32, columns: int = 24, depth: int = 16) -> TunableKernel:
    import tvm
    from tvm import te

    a = te.placeholder((rows, depth), name="A")
    b = te.placeholder((depth, columns), name="B")
    k = te.reduce_axis((0, depth), name="k")
    c = te.compute((rows, columns), lambda i, j: te.sum(a[i, k] * b[k, j], axis=k), name="C")
    return TunableKernel("matmul", 2, tvm.IRModule({"main": te.create_prim_func([a, b, c])}))


def main() -> None:
    def show(snapshot: Snapshot) -> None:
        print(snapshot.trials, flush=True)

    target = targets.native()
    store = Store(Path(sys.argv[1]), target)
    store.repair()
    Session([matmul()], target, store, model="test", show=show).run(trials=int(sys.argv[2]))


if __name__ == "__main__":
    main()
