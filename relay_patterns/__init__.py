"""Regions of the imported graph that become one call each, in the order in which they are looked for."""

from __future__ import annotations

from collections.abc import Callable

from tvm import relax
from tvm.ir.transform import Pass
from tvm.relax.transform import FuseOpsByPattern, FusionPattern, PatternCheckContext

from relay_patterns.ciffn import ciffn
from relay_patterns.conv import conv, conv_gelu
from relay_patterns.dwsconv import dwsconv
from relay_patterns.head import head
from relay_patterns.region import Reading, Region
from relay_patterns.saa import saa

__all__ = ["Reading", "Region", "fuse_regions", "read_composite", "regions"]

PREFIX = "saevit."
Accept = Callable[[Region, Reading], bool]


def regions() -> list[Region]:
    """Larger before smaller: what is left of an unmatched block still has its convolutions found."""
    return [*saa(), ciffn(), dwsconv(), conv_gelu(), conv(), head()]


def fuse_regions(accept: Accept) -> Pass:
    """Group every match that `accept` agrees to into a function of its own, weights inside."""

    def fusion(index: int, region: Region) -> FusionPattern:
        def check(context: PatternCheckContext) -> bool:
            reading = region.read(dict(context.annotated_expr.items()))
            return reading is not None and accept(region, reading)

        return FusionPattern(f"{PREFIX}{region.name}.{index}", region.pattern, region.parts, check)

    patterns = [fusion(index, region) for index, region in enumerate(regions())]
    return FuseOpsByPattern(patterns, bind_constants=True)


def read_composite(func: relax.Function) -> tuple[Region, Reading] | None:
    """The region that a grouped function is, with its shape and weights; None for any other function."""
    name = str(func.attrs["Composite"]) if func.attrs and "Composite" in func.attrs else ""
    if not name.startswith(PREFIX):
        return None
    region = regions()[int(name.rsplit(".", 1)[1])]
    result = func.body.body
    values = relax.analysis.get_var2val(func)
    matched = region.pattern.extract_matched_expr(values.get(result, result), values)
    reading = region.read({part: matched[pattern] for part, pattern in region.parts.items()})
    assert reading is not None, f"{name} was read once and cannot be read again"
    return region, reading
