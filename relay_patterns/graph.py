"""A function of the graph as values, and who uses each."""

from __future__ import annotations

from collections.abc import Iterable

from tvm import relax


class Graph:
    """`order` has every variable that is bound, in the order of the function; `values` what each is bound to."""

    def __init__(self, func: relax.Function) -> None:
        self.func = func
        self.values = relax.analysis.get_var2val(func)
        self.order = [binding.var for block in func.body.blocks for binding in block.bindings]
        self.reads = {var: list(relax.analysis.free_vars(self.values[var])) for var in self.order}
        self.outputs = set(relax.analysis.free_vars(func.body.body))
        self._bound = {self.values[var]: var for var in self.order}
        self._users: dict[relax.Var, list[relax.Var]] = {}
        for user, reads in self.reads.items():
            for var in reads:
                self._users.setdefault(var, []).append(user)

    def users(self, var: relax.Var) -> list[relax.Var]:
        """Who reads a value inside the function."""
        return self._users.get(var, [])

    def call(self, var: relax.Var) -> relax.Call | None:
        """The call that gives a variable its value, if it is one."""
        value = self.values[var] if var in self.reads else None
        return value if isinstance(value, relax.Call) else None

    def variable(self, expr: relax.Expr) -> relax.Expr:
        """The variable of a value: TVM's matcher looks through variables."""
        return self._bound.get(expr, expr)

    def between(self, inputs: Iterable[relax.Expr], result: relax.Var) -> set[relax.Var] | None:
        """What is computed between inputs and a result; None if something of it has a user outside.

        Such a value would have to be computed twice, and a parameter that is no input cannot be computed at all.
        """
        inner: set[relax.Var] = set()
        known = {var for expr in inputs for var in relax.analysis.free_vars(expr)}
        waiting = [result]
        while waiting:
            for var in self.reads[waiting.pop()]:
                if var in known or var in inner:
                    continue
                if var not in self.reads:
                    return None
                inner.add(var)
                waiting.append(var)
        leaks = any(user is not None for var in inner for user in self._outside(var, inner, result))
        return None if leaks or inner & self.outputs else inner

    def _outside(self, var: relax.Var, inner: set[relax.Var], result: relax.Var) -> list[relax.Var]:
        return [user for user in self.users(var) if user not in inner and not user.same_as(result)]
