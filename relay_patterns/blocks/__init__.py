"""Blocks that become one kernel each: one file each, found by itself.

A file has `regions()`: the ways to write its block, larger ones first.
"""

from __future__ import annotations

import sys
from functools import cache

from relay_patterns.region import Region
from schedules.discovery import modules


@cache
def _files() -> list[list[Region]]:
    return [module.regions() for module in modules(sys.modules[__name__])]


def blocks() -> list[Region]:
    """All that are looked for: blocks of many parts before those of few, which may be a part of them."""
    files = sorted(_files(), key=lambda regions: -max(len(region.parts) for region in regions))
    return [region for regions in files for region in regions]
