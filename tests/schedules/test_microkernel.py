"""The register tile, the polynomials, and what LLVM makes of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
from tvm import tirx

from schedules.cpu import math as polynomials
from schedules.cpu.builder import Builder
from schedules.cpu.isa import AVX2, AVX512, AVX512VL, NEON, SSE, Isa, isa_of
from schedules.cpu.microkernel import Rows, Tile, gemm, pack, panels, pieces, tile_for

X86 = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}


def product(m: int, k: int, n: int, tile: Tile, isa: Isa) -> tirx.PrimFunc:
    b = Builder()
    a = b.param("a", (m, k))
    weight = b.param("weight", (panels(n, tile, isa), k, tile.vectors * isa.lanes))
    out = b.param("out", (m, n))
    rows = Rows(a, lambda row: row * k, ((k, 1),))
    gemm(b, isa, tile, rows, weight, m, n, lambda row, column, value: b.store(out, row * n + column, value))
    return b.function("product")


@pytest.mark.parametrize(
    ("m", "k", "n", "tile"),
    [(6, 8, 16, Tile(6, 2)), (49, 30, 50, Tile(5, 2)), (7, 3, 5, Tile(3, 1, 2)), (23, 9, 77, Tile(4, 3, 3))],
)
def test_product_with_every_tail(
    call: Callable[..., np.ndarray], here: Isa, m: int, k: int, n: int, tile: Tile
) -> None:
    random = np.random.RandomState(0)
    a, b = random.randn(m, k).astype(np.float32), random.randn(k, n).astype(np.float32)
    found = call(product(m, k, n, tile, here), [a, pack(b, tile, here)], (m, n))
    np.testing.assert_allclose(found, a.astype(np.float64) @ b, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "isa"),
    [
        ({**X86, "mcpu": "x86-64-v3"}, AVX2),
        ({**X86, "mcpu": "znver4"}, AVX512),
        ({**X86, "mcpu": "znver4", "mattr": ["-avx512f"]}, AVX2),
        ({**X86, "mcpu": "x86-64-v4"}, AVX512VL),
        ({**X86, "mcpu": "x86-64"}, SSE),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}, NEON),
    ],
)
def test_vectors_of_a_target(target: dict[str, object], isa: Isa) -> None:
    assert isa_of(target) == isa


@pytest.mark.parametrize(
    ("target", "multiply", "spill"),
    [
        ({**X86, "mcpu": "x86-64-v3"}, r"vfmadd\w+ps.*ymm", r"vmov\w+\s+%ymm\d+, -?\d*\(%rsp"),
        ({**X86, "mcpu": "znver4"}, r"vfmadd\w+ps.*zmm", r"vmov\w+\s+%zmm\d+, -?\d*\(%rsp"),
        ({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}, r"fmla", r"st[rp]\s+q\d+.*\[sp"),
    ],
)
def test_inner_loop_is_multiply_adds(
    assembly: Callable[..., str], target: dict[str, object], multiply: str, spill: str
) -> None:
    """Of a tile of whole panels, every accumulator is one fused multiply-add a step, and none leaves its register."""
    isa = isa_of(target)
    tile = tile_for(isa, 196, 192)
    tile = Tile(tile.rows, tile.vectors, 4)
    text = assembly(product(10 * tile.rows, 64, 2 * tile.vectors * isa.lanes, tile, isa), target)
    blocks = re.split(r"\n\.LBB\w+:", re.sub(r"\n\.Ltmp\d+:", "", text))
    inner = max(blocks, key=lambda block: len(re.findall(multiply, block)))
    found = [match.end() for match in re.finditer(multiply, inner)]
    assert len(found) == tile.rows * tile.vectors * tile.unroll
    assert not re.search(spill, inner[: found[-1]])


@pytest.mark.parametrize(("wanted", "lanes"), [(8, 8), (7, 8), (13, 16), (1, 4)])
def test_pieces_cover_without_overlap(wanted: int, lanes: int) -> None:
    covered = [start + i for start, width in pieces(wanted, lanes) for i in range(width)]
    assert covered == list(range(wanted))


def through(function: Callable[..., object], count: int, lanes: int) -> tirx.PrimFunc:
    b = Builder()
    x, y = b.param("x", (count,)), b.param("y", (count,))
    with b.loop("i", count // lanes) as i:
        b.store(y, i * lanes, function(b, b.load(x, i * lanes, lanes)))
    return b.function("through")


def test_gelu_is_the_exact_one(call: Callable[..., np.ndarray], here: Isa) -> None:
    x = np.concatenate([np.linspace(-12, 12, 96_000), [0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 50, -50]]).astype(np.float32)
    found = call(through(polynomials.gelu, len(x), 8), [x], x.shape)
    exact = np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(np.float64)])
    assert np.max(np.abs(found - exact) / np.maximum(1, np.abs(x))) < 1e-6


def test_exp_is_accurate_and_saturates(call: Callable[..., np.ndarray], here: Isa) -> None:
    x = np.concatenate([np.linspace(-86, 87, 96_000), [0, -1e5, -200, 1e5, 200, -0.0, 1, -1]]).astype(np.float32)
    found = call(through(polynomials.exp, len(x), 8), [x], x.shape)
    inside = np.abs(x) < 87
    assert np.max(np.abs(found[inside] / np.exp(x[inside].astype(np.float64)) - 1)) < 3e-7
    assert np.isfinite(found).all()
    assert found[-7] < 1e-37
