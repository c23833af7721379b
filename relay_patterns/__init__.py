"""Regions of the imported graph that become one call each, in the order in which they are looked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import relax
from tvm.ir.transform import Pass
from tvm.relax.backend.utils import has_leaking_intermediate_variables
from tvm.relax.transform import FuseOpsByPattern, FusionPattern, PatternCheckContext

from relay_patterns.ciffn import ciffn
from relay_patterns.conv import conv, conv_gelu
from relay_patterns.dwsconv import dwsconv
from relay_patterns.head import head
from relay_patterns.near_miss import first_difference
from relay_patterns.region import Reading, Region
from relay_patterns.saa import saa

__all__ = ["Reading", "Region", "blocks", "fuse_regions", "layers", "missed", "read_composite"]

PREFIX = "saevit."
Accept = Callable[[Region, Reading], bool]


def blocks() -> list[Region]:
    """The blocks of the network."""
    return [*saa(), ciffn(), dwsconv()]


def layers() -> list[Region]:
    """What is between and behind the blocks, and what is left of a block that was not found."""
    return [conv_gelu(), conv(), head()]


def fuse_regions(regions: Sequence[Region], accept: Accept) -> Pass:
    """Group every match that `accept` agrees to into a function of its own, weights inside; larger regions first.

    Nothing inside a match may have a user outside: it would have to be computed twice.
    """

    def fusion(region: Region) -> FusionPattern:
        def check(context: PatternCheckContext) -> bool:
            if has_leaking_intermediate_variables(context):
                return False
            reading = region.read(dict(context.annotated_expr.items()))
            return reading is not None and accept(region, reading)

        return FusionPattern(PREFIX + region.variant, region.pattern, region.parts, check)

    return FuseOpsByPattern([fusion(region) for region in regions], bind_constants=True)


def read_composite(func: relax.Function) -> tuple[Region, Reading] | None:
    """The region that a grouped function is, with its shape and weights; None for any other function."""
    name = str(func.attrs["Composite"]) if func.attrs and "Composite" in func.attrs else ""
    if not name.startswith(PREFIX):
        return None
    region = next(region for region in [*blocks(), *layers()] if name == PREFIX + region.variant)
    result = func.body.body
    values = relax.analysis.get_var2val(func)
    matched = region.pattern.extract_matched_expr(values.get(result, result), values)
    reading = region.read({part: matched[pattern] for part, pattern in region.parts.items() if pattern in matched})
    assert reading is not None, f"{name} was read once and cannot be read again"
    return region, reading


def missed(func: relax.Function, name: str) -> str | None:
    """Why a block that should be in the graph is not: the first operator that differs from its pattern."""
    return first_difference(func, [region for region in blocks() if region.name == name])
