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
from schedules.cpu.microkernel import Rows, Tile, gemm, pack, panels, pieces, tile_for
from schedules.machines.cpus import AVX2, AVX512, AVX512VL, NEON, SSE, Isa, isa_of

X86 = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}


RPI5 = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a76"}


@pytest.fixture(params=["here", "neon"])
def vectors(request: pytest.FixtureRequest, here: Isa) -> Isa:
    """This CPU's, and NEON's, of which LLVM makes code for this CPU, too."""
    return here if request.param == "here" else NEON


def product(
    m: int, k: int, n: int, tile: Tile, isa: Isa, depth: tuple[tuple[int, int], ...] = (), pitch: int = 0
) -> tirx.PrimFunc:
    """A times B; the rows of A are neighbours, unless a depth with gaps and a pitch of the rows say otherwise."""
    pitch = pitch or k
    b = Builder(isa.dtype, isa.stored)
    a = b.param("a", (m, pitch))
    weight = b.param("weight", (panels(n, tile, isa), k, tile.vectors * isa.lanes))
    out = b.param("out", (m, n))
    rows = Rows(a, lambda row: row * pitch, depth or ((k, 1),))
    gemm(b, isa, tile, rows, weight, m, n, lambda row, column, value: b.store(out, row * n + column, value))
    return b.function("product")


@pytest.mark.parametrize(
    ("m", "k", "n", "tile"),
    [(6, 8, 16, Tile(6, 2)), (49, 30, 50, Tile(5, 2)), (7, 3, 5, Tile(3, 1, 2)), (23, 9, 77, Tile(4, 3, 3))],
)
def test_product_with_every_tail(
    call: Callable[..., np.ndarray], vectors: Isa, m: int, k: int, n: int, tile: Tile
) -> None:
    random = np.random.RandomState(0)
    a, b = random.randn(m, k).astype(np.float32), random.randn(k, n).astype(np.float32)
    found = call(product(m, k, n, tile, vectors), [a, pack(b, tile, vectors)], (m, n))
    np.testing.assert_allclose(found, a.astype(np.float64) @ b, atol=1e-5)


@pytest.mark.parametrize("depth", [((3, 11), (9, 1)), ((4, 7), (3, 2)), ((2, 14), (2, 7), (6, 1)), ((5, 3),)])
def test_depth_with_gaps(call: Callable[..., np.ndarray], vectors: Isa, depth: tuple[tuple[int, int], ...]) -> None:
    """Windows: runs of neighbours of any length, starting anywhere, and elements that are none."""
    places = np.zeros(1, int)
    for extent, step in depth:
        places = (places[:, None] + np.arange(extent) * step).reshape(-1)
    random, pitch, tile = np.random.RandomState(0), 35, Tile(4, 2)
    a, b = random.randn(9, pitch).astype(np.float32), random.randn(len(places), 20).astype(np.float32)
    func = product(9, len(places), 20, tile, vectors, depth, pitch)
    found = call(func, [a, pack(b, tile, vectors)], (9, 20))
    np.testing.assert_allclose(found, a[:, places].astype(np.float64) @ b, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "isa"),
    [
        ({**X86, "mcpu": "x86-64-v3"}, AVX2),
        ({**X86, "mcpu": "znver4"}, AVX512),
        ({**X86, "mcpu": "znver4", "mattr": ["-avx512f"]}, AVX2),
        ({**X86, "mcpu": "x86-64-v4"}, AVX512VL),
        ({**X86, "mcpu": "x86-64"}, SSE),
        (RPI5, NEON),
    ],
)
def test_vectors_of_a_target(target: dict[str, object], isa: Isa) -> None:
    assert isa_of(target) == isa


@pytest.mark.parametrize(
    ("target", "multiply", "spill"),
    [
        ({**X86, "mcpu": "x86-64-v3"}, r"vfmadd\w+ps.*ymm", r"vmov\w+\s+%ymm\d+, -?\d*\(%rsp"),
        ({**X86, "mcpu": "znver4"}, r"vfmadd\w+ps.*zmm", r"vmov\w+\s+%zmm\d+, -?\d*\(%rsp"),
        (RPI5, r"fmla", r"st[rp]\s+q\d+.*\[sp"),
    ],
)
def test_inner_loop_is_multiply_adds(
    assembly: Callable[..., str], target: dict[str, object], multiply: str, spill: str
) -> None:
    """Of a tile of whole panels, every accumulator is one fused multiply-add a step, and none leaves its register."""
    isa = isa_of(target)
    tile = tile_for(isa, 196, 192)
    tile = Tile(tile.rows, tile.vectors, 4)
    inner = inner_loop(assembly(product(10 * tile.rows, 64, 2 * tile.vectors * isa.lanes, tile, isa), target), multiply)
    found = [match.end() for match in re.finditer(multiply, inner)]
    assert len(found) == tile.rows * tile.vectors * tile.unroll
    assert not re.search(spill, inner[: found[-1]])


def inner_loop(text: str, multiply: str) -> str:
    """The block of the assembly with the most multiply-adds."""
    blocks = re.split(r"\n\.LBB\w+:", re.sub(r"\n\.Ltmp\d+:", "", text))
    return max(blocks, key=lambda block: len(re.findall(multiply, block)))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_neon_loads_neighbours_of_a_row_at_once(assembly: Callable[..., str], dtype: str) -> None:
    """Each step of the depth multiplies by a lane of what was loaded for as many steps as a vector has lanes."""
    isa = NEON.storing(dtype)
    tile = tile_for(isa, 196, 192)
    b = Builder(isa.dtype, isa.stored)
    depth, rows = 64, 10 * tile.rows
    a, weight = b.param("a", (rows, depth)), b.param("weight", (1, depth, tile.vectors * isa.lanes))
    out = b.param("out", (rows, tile.vectors * isa.lanes))
    columns = tile.vectors * isa.lanes
    left = Rows(a, lambda row: row * depth, ((depth, 1),))
    gemm(b, isa, tile, left, weight, rows, columns, lambda row, at, value: b.store(out, row * columns + at, value))
    text = assembly(b.function("product"), RPI5)
    assert "AllocWorkspace" not in text  # all that changes is in registers
    inner = inner_loop(text, "fmla")
    steps = len(re.findall(r"fmla\s+v\d+\.\d[sh], v\d+\.\d[sh], v\d+\.[sh]\[\d\]", inner)) / tile.rows / tile.vectors
    assert steps % isa.lanes == 0 and steps * tile.rows * tile.vectors == len(re.findall("fmla", inner))
    loaded = len(re.findall(r"\bld[ru]r?\s+q", inner)) + 2 * len(re.findall(r"\bldp\s+q", inner))
    assert loaded == steps * (tile.vectors + tile.rows / isa.lanes) and not re.search(r"\bld1|\bldr\s+[sh]\d", inner)


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
    assert np.isfinite(found[x < 88]).all() and np.isposinf(found[x > 88]).all()
    assert found[-7] < 1e-37
    for lanes in (1, 4, 16):
        odd = np.array([np.nan, 1.0] * 16, np.float32)
        assert (np.isnan(call(through(polynomials.exp, 32, lanes), [odd], odd.shape)) == np.isnan(odd)).all()
