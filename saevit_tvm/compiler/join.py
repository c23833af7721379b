"""One library for several batches: a function for each, which share the weights.

The virtual machine keeps equal constants once, so weights stand in the library once, unless a batch likes them packed
in another way.
"""

from __future__ import annotations

import tvm
from tvm import relax


def joined(mod: tvm.IRModule, other: tvm.IRModule, name: str) -> tvm.IRModule:
    """The first module, with the other's `main` under this name and all that it calls."""
    joining = _Joining(mod, other)
    main = joining.visit_expr(other["main"])
    joining.builder_.add_func(main.with_attr("global_symbol", name), name)
    return joining.builder_.get()


@relax.expr_functor.mutator
class _Joining(relax.PyExprMutator):
    """Brings the functions that are called; where a name is taken by another one, the builder finds a new one."""

    def __init__(self, mod: tvm.IRModule, other: tvm.IRModule) -> None:
        super().__init__(mod)
        self._other = other
        self._brought: dict[str, tvm.ir.GlobalVar] = {}

    def visit_global_var_(self, called: tvm.ir.GlobalVar) -> tvm.ir.GlobalVar:
        name = called.name_hint
        if name not in self._brought:
            function = self._other[called].without_attr("global_symbol")
            self._brought[name] = self.builder_.add_func(function, name)
        return self._brought[name]
