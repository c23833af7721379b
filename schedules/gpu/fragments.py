"""Matrices of 16 x 16 that the work-items of a warp multiply together: by tensor cores, or as plain loops.

On tensor cores a fragment is NVIDIA's affair (`nvcuda::wmma`): which work-item keeps which numbers is not said. As
loops, every work-item has eight neighbours of the result, and copies of what they are computed from. All that is
around a fragment is the same either way, so a device without tensor cores can show that it is right.
"""

from __future__ import annotations

from dataclasses import dataclass

from schedules.gpu.launch import nest

SIDE = 16
WARP = 32
SHARE = SIDE * SIDE // WARP  # of a result, for one work-item
REGISTERS = 8  # of a work-item, for a fragment of either type
SHAPE = f"{SIDE}, {SIDE}, {SIDE}"


@dataclass(frozen=True)
class Fragments:
    """`rows` matrices of weights by `columns` of inputs, and the sums of all their products, of every warp.

    Weights and inputs lie in local memory with their terms below each other: a row of either is one input channel.
    """

    rows: int
    columns: int
    as_loops: bool

    @property
    def registers(self) -> int:
        return REGISTERS * (self.rows + self.columns + self.rows * self.columns)

    def times(self, count: int) -> str:
        """So many turns: fragments are registers, which only unrolled loops can count; memory can be counted anyhow."""
        return f"range({count})" if self.as_loops else f"T.unroll({count})"

    def memory(self) -> list[tuple[str, int, str, str]]:
        """Name, size, type and place of what has to be there."""
        sums = self.rows * self.columns
        if self.as_loops:
            return [
                ("fw", self.rows * SIDE, "float32", "local"),
                ("fx", self.columns * SIDE * SHARE, "float32", "local"),
                ("sums", sums * SHARE, "float32", "local"),
            ]
        return [
            ("fw", self.rows * SIDE * SIDE, "float16", "wmma.matrix_a"),
            ("fx", self.columns * SIDE * SIDE, "float16", "wmma.matrix_b"),
            ("sums", sums * SIDE * SIDE, "float32", "wmma.accumulator"),
        ]

    def clear(self) -> str:
        """All sums are zero."""
        if self.as_loops:
            return nest(f"for s in range({self.rows * self.columns * SHARE}):", "sums[s] = T.float32(0)")
        cleared = f"T.evaluate(T.tvm_fill_fragment(sums.data, {SHAPE}, s, T.float32(0)))"
        return nest(f"for s in T.unroll({self.rows * self.columns}):", cleared)

    def load_weights(self, which: str, source: str, at: str, stride: int) -> str:
        """From local memory, where their terms are below each other, so that they are transposed."""
        if self.as_loops:
            element = f"fw[{which} * {SIDE} + q] = {source}[{at} + q * {stride} + tx // 2]"
            return nest(f"for q in range({SIDE}):", element)
        return _loaded("fw", which, source, at, stride, "col_major")

    def load_inputs(self, which: str, source: str, at: str, stride: int) -> str:
        if self.as_loops:
            element = f"fx[({which} * {SIDE} + q) * {SHARE} + v] = {source}[{at} + q * {stride} + {_COLUMN} + v]"
            return nest(f"for q in range({SIDE}):", nest(f"for v in range({SHARE}):", element))
        return _loaded("fx", which, source, at, stride, "row_major")

    def multiply(self, row: str, column: str) -> str:
        """sums += weights x inputs, for one matrix of each."""
        which = f"({row} * {self.columns} + {column})"
        if self.as_loops:
            total = f"sums[{which} * {SHARE} + v]"
            product = f"fw[{row} * {SIDE} + q] * fx[({column} * {SIDE} + q) * {SHARE} + v]"
            step = nest(f"for v in range({SHARE}):", f"{total} = {total} + {product}")
            return nest(f"for q in range({SIDE}):", step)
        return f"T.evaluate(T.tvm_mma_sync(sums.data, {which}, fw.data, {row}, fx.data, {column}, sums.data, {which}))"

    def store(self, which: str, target: str, at: str, stride: int) -> str:
        """A matrix of sums into local memory, row by row."""
        if self.as_loops:
            element = f"{target}[{at} + tx // 2 * {stride} + {_COLUMN} + v] = sums[{which} * {SHARE} + v]"
            return nest(f"for v in range({SHARE}):", element)
        # An address and no access_ptr, whose type TVM checks after it has let these numbers share others' memory.
        place = f"T.address_of({target}[{at}])"
        return f'T.evaluate(T.tvm_store_matrix_sync(sums.data, {SHAPE}, {which}, {place}, {stride}, "row_major"))'


_COLUMN = f"tx % 2 * {SHARE}"  # of the result, the first that a work-item has


def _loaded(name: str, which: str, source: str, at: str, stride: int, order: str) -> str:
    # An access_ptr and no address, of which TVM thinks that nobody needs what is loaded from it.
    place = f'{source}.access_ptr("r", ptr_type="float16", offset={at})'
    return f'T.evaluate(T.tvm_load_matrix_sync({name}.data, {SHAPE}, {which}, {place}, {stride}, "{order}"))'
