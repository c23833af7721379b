"""Every family of kernels there is, for what is asked of a declared kernel without knowing its machine."""

from __future__ import annotations

from tvm import tirx

from schedules.cpu.registry import GENERATORS
from schedules.gpu.registry import KERNELS
from schedules.kernels import completed, declared, noted


def chosen_tiling(func: tirx.PrimFunc) -> dict[str, int] | None:
    """The tiling that was noted on a declaration; None where none was, or no generator has these knobs any more."""
    spec, tiling = declared(func), noted(func)
    if spec is None or tiling is None:
        return None
    whole = (completed(tiling, kind) for kind in _tilings(spec.op))
    return next((each for each in whole if each is not None), None)


def outdated(func: tirx.PrimFunc) -> bool:
    """Whether a tiling was noted that no generator understands any more."""
    return noted(func) is not None and chosen_tiling(func) is None


def _tilings(op: str) -> list[type]:
    of_gpu: list[type] = [KERNELS[op].KNOBS] if op in KERNELS else []
    return of_gpu or [each.TILING for each in GENERATORS if op == each.OP]
