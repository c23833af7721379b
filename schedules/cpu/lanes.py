"""Across the lanes of vectors: many sums or maxima at once, small transposes, and powers of two."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx

from schedules.cpu.builder import Builder, Expr, lanes_of, splat

# 2^x for |x| <= 1/2, minimax; the relative error is below 1e-7.
_EXP2 = (1.00000007, 0.69314697, 0.2402212, 0.05550713, 0.00967554, 0.00132765)
# 1.5 * 2^23: adding it leaves the nearest integer in the last bits of a float32; and 127, the exponent of one.
_ROUND = 12582912.0 + 127.0
_LOWEST = -125.0

Combine = Callable[[Expr, Expr], Expr]


def exp2(b: Builder, x: Expr, strict: bool = False) -> Expr:
    """2^x for x <= 0, as a softmax needs it; what is smaller than 2^-125 counts as that, or if `strict` as 0.

    NaN stays NaN: the larger of two is the second one where they are not comparable.
    """
    lanes = lanes_of(x)
    x = b.compute_once("x", x if strict else tirx.max(splat(_LOWEST, lanes), x))
    integer = "int32" if lanes == 1 else f"int32x{lanes}"
    # Its bits, and back: TVM would simplify (x + 1) - 1 as if there were no rounding.
    bits = b.compute_once("bits", tirx.reinterpret(integer, x + splat(_ROUND, lanes)))
    rounded = tirx.reinterpret(x.ty.dtype, bits) - splat(_ROUND, lanes)
    part = b.compute_once("part", x - rounded)
    power = splat(_EXP2[-1], lanes)
    for coefficient in reversed(_EXP2[:-1]):
        power = b.compute_once("power", power * part + splat(coefficient, lanes))
    shift = tirx.const(23, "int32") if lanes == 1 else tirx.Broadcast(tirx.const(23, "int32"), lanes)
    # A product, not a sum of exponents: whatever bits NaN has, it stays so.
    scale = tirx.reinterpret(power.ty.dtype, tirx.shift_left(bits, shift))
    result = b.compute_once("exp2", power * scale)
    return b.bind("exp2", tirx.Select(x < splat(_LOWEST, lanes), splat(0.0, lanes), result)) if strict else result


def across(b: Builder, vectors: Sequence[Expr], combine: Combine) -> Expr:
    """A vector whose lane i is `vectors[i]`, combined over its lanes; at most as many vectors as they have lanes."""
    rows = [*vectors, *[vectors[0]] * (power_of_two(len(vectors)) - len(vectors))]
    block = lanes_of(rows[0])
    while len(rows) > 1:
        half = len(rows) // 2
        rows = [b.compute_once("part", combine(*_halves(b, rows[i], rows[i + half], block))) for i in range(half)]
        block //= 2
    (row,) = rows
    while block > 1:
        even, odd = (_pick(b, [row], range(start, lanes_of(row), 2)) for start in (0, 1))
        row = b.compute_once("part", combine(even, odd))
        block //= 2
    return row


def transposed(b: Builder, vectors: Sequence[Expr]) -> list[Expr]:
    """As many vectors as they have lanes, turned."""
    groups, block = [list(vectors)], len(vectors)
    while block > 1:
        half = block // 2
        turned: list[list[Expr]] = []
        for group in groups:
            pairs = [_halves(b, group[i], group[i + half], block) for i in range(half)]
            turned += [[low for low, _ in pairs], [high for _, high in pairs]]
        groups, block = turned, half
    return [group[0] for group in groups]


def lane(vector: Expr, index: int, lanes: int) -> Expr:
    """One lane in every lane of another vector; where the CPU multiplies by a lane, LLVM makes no vector of it."""
    return splat(tirx.Shuffle([vector], [tirx.const(index, "int32")]), lanes)


def largest(a: Expr, b: Expr) -> Expr:
    """The larger numbers of two vectors, and NaN where one of them is; TIR's maximum would drop one of a pair."""
    return tirx.Select(tirx.Or(b > a, tirx.isnan(b)), b, a)


def without_first(b: Builder, vector: Expr, count: int) -> Expr:
    """Zeros in the first lanes of a vector."""
    lanes = lanes_of(vector)
    chosen = [lane + (lanes if lane < count else 0) for lane in range(lanes)]
    return _pick(b, [vector, splat(0.0, lanes)], chosen)


def power_of_two(count: int) -> int:
    """The next one from `count` on."""
    return 1 << (count - 1).bit_length()


def _halves(b: Builder, first: Expr, second: Expr, block: int) -> tuple[Expr, Expr]:
    """In every block of lanes, the lower halves of both vectors side by side; and the upper halves."""
    lanes, half = lanes_of(first), block // 2
    low = [source + at + i for at in range(0, lanes, block) for source in (0, lanes) for i in range(half)]
    return _pick(b, [first, second], low), _pick(b, [first, second], [lane + half for lane in low])


def _pick(b: Builder, vectors: list[Expr], lanes: Sequence[int]) -> Expr:
    if len(lanes) == 1 and lanes_of(vectors[0]) == 1:
        return vectors[lanes[0]]
    return b.bind("picked", tirx.Shuffle(vectors, [tirx.const(lane, "int32") for lane in lanes]))
