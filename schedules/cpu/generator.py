"""What a generator of CPU kernels is: one class a family, from a spec to loops and packed weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, ClassVar, Protocol

import numpy as np
from tvm import tirx

from schedules.machines.cpus import Isa
from schedules.spec import KernelSpec

Arrays = Mapping[str, np.ndarray]
MADE_FROM = "saevit.made_from"  # on loops: the digest of all that they follow from, but the code here
KEPT = 256  # loops that this process keeps: a model calls many kernels of one spec, which differ in weights alone


class Loops(Protocol):
    """One kernel, tiled, for one vector unit."""

    def function(self) -> tirx.PrimFunc:
        """func(*inputs, *constants, *outputs)."""

    def constants(self, weights: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The weights as the loops read them, in the order of the parameters."""


class Generator(ABC):
    """A family of kernels. A `problem` is what its loops want to know of a spec; a tiling is a frozen dataclass.

    Its methods take the vector unit of the target in float32; `unit` is the one to compute with.
    """

    OP: ClassVar[str]
    TILING: ClassVar[type]
    WIDE: ClassVar[bool] = False  # computed in float32 whatever is stored

    @abstractmethod
    def problem(self, spec: KernelSpec) -> Any | None:
        """What the loops want to know of a spec; None where there are no loops for it. Cheap: nothing is generated."""

    @abstractmethod
    def default_for(self, problem: Any, unit: Isa, threads: int) -> Any:
        """The tiling to take where nothing was tuned."""

    @abstractmethod
    def tilings_for(self, problem: Any, unit: Isa) -> list[Any]:
        """The search space."""

    @abstractmethod
    def loops(self, problem: Any, unit: Isa, tiling: Any, threads: int) -> Loops: ...

    @abstractmethod
    def reference_for(self, problem: Any, arrays: Arrays) -> np.ndarray:
        """What is computed, in numpy and float64, from inputs and weights by name."""

    def reference(self, spec: KernelSpec, arrays: Arrays) -> np.ndarray:
        return self.reference_for(self.problem(spec), arrays)

    def flops(self, spec: KernelSpec) -> int:
        problem: Any = self.problem(spec)
        return int(problem.flops)

    def accepts(self, spec: KernelSpec, isa: Isa) -> bool:
        return spec.op == self.OP and self.problem(spec) is not None

    def pays(self, _problem: Any, _threads: int) -> bool:
        """Whether one kernel takes less time than one each for its parts. Asked where nothing is declared yet."""
        return True

    def default(self, spec: KernelSpec, isa: Isa, threads: int = 1) -> Any:
        return self.default_for(self.problem(spec), self.unit(spec, isa), threads)

    def tilings(self, spec: KernelSpec, isa: Isa) -> list[Any]:
        return self.tilings_for(self.problem(spec), self.unit(spec, isa))

    def generate(self, spec: KernelSpec, isa: Isa, tiling: Any | None = None, threads: int = 1) -> tirx.PrimFunc:
        """The loops."""
        tiling = tiling or self.default(spec, isa, threads)
        # Units of different cores are equal, and their best tilings are not; a repr has the core, too.
        source = repr((type(self).__qualname__, spec, isa, tiling, threads))
        digest = sha256(source.encode()).hexdigest()
        if digest not in _made:
            func = self.tiled(spec, isa, tiling, threads).function().with_attr(MADE_FROM, digest)
            while len(_made) >= KEPT:
                _made.pop(next(iter(_made)))
            _made[digest] = func
        return _made[digest]

    def lower(
        self, spec: KernelSpec, weights: Arrays, isa: Isa, tiling: Any | None = None, threads: int = 1
    ) -> tuple[tirx.PrimFunc, list[np.ndarray]]:
        """The loops, and the weights packed as they read them."""
        tiling = tiling or self.default(spec, isa, threads)
        func = self.generate(spec, isa, tiling, threads)
        return lowered(self.tiled(spec, isa, tiling, threads), weights, len(spec.inputs), func)

    def bytes(self, spec: KernelSpec) -> int:
        """What has to be read and written at least."""
        sizes = {"float32": 4, "float16": 2}
        tensors = (*spec.inputs, *spec.weights, *spec.outputs)
        return sum(int(np.prod(each.shape)) * sizes.get(each.dtype, 4) for each in tensors)

    def unit(self, spec: KernelSpec, isa: Isa) -> Isa:
        """The vector unit for what the kernel stores."""
        unit = isa.storing(spec.out.dtype)
        return unit.wide() if self.WIDE else unit

    def tiled(self, spec: KernelSpec, isa: Isa, tiling: Any, threads: int) -> Loops:
        return self.loops(self.problem(spec), self.unit(spec, isa), tiling, threads)


_made: dict[str, tirx.PrimFunc] = {}


def made_from(func: tirx.PrimFunc) -> str | None:
    """The digest of what loops were made from; None where they are not, or no longer, as they were made.

    Nothing changes a body that is kept here: who rewrites loops makes another.
    """
    digest = func.attrs.get(MADE_FROM) if func.attrs else None
    made = _made.get(digest) if digest else None
    same = made is not None and func.body.same_as(made.body) and func.params.same_as(made.params)
    return digest if same else None


def lowered(
    loops: Loops, weights: Arrays, inputs: int = 1, func: tirx.PrimFunc | None = None
) -> tuple[tirx.PrimFunc, list[np.ndarray]]:
    """A kernel, made here if it is not given, and its weights, in the types that it reads them in, rounded once."""
    func = func or loops.function()
    packed = loops.constants(dict(weights))
    params = func.params[inputs : inputs + len(packed)]
    return func, [np.asarray(value, str(param.dtype)) for value, param in zip(packed, params, strict=True)]
