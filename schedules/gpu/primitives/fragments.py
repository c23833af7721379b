"""Matrices that the threads of a warp multiply together on tensor cores, by functions that come with the kernels.

TVM has words for such products in float16 and bfloat16, one for each, and none for tf32. Here a whole staged step is
one call of a function in CUDA C++. Which thread keeps which numbers of a fragment is NVIDIA's affair (`nvcuda::wmma`);
the sums are eight numbers of every thread, and nobody but these functions asks which.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from textwrap import dedent

SIDE = 16  # of a matrix of sums
WARP = 32
SHARE = SIDE * SIDE // WARP  # of such a matrix, for one thread
FACTOR = 8  # registers of a thread that a fragment of what is multiplied takes at most


@dataclass(frozen=True)
class Arithmetic:
    """How numbers lie in memory and what tensor cores call them, in CUDA C++; terms of one of their products."""

    memory: str
    element: str
    terms: int
    rounded: bool = False  # before they are multiplied, because in memory they are longer


ARITHMETICS = {
    "float16": Arithmetic("half", "half", 16),
    "bfloat16": Arithmetic("nv_bfloat16", "nv_bfloat16", 16),
    "tf32": Arithmetic("float", "precision::tf32", 8, rounded=True),
}


@dataclass(frozen=True)
class Fragments:
    """`rows` matrices of the left factor by `columns` of the right one and the sums of their products, of every warp.

    Both lie in local memory with their `terms` below each other, `left` and `right` numbers apart; of the left one with
    `beside` they lie beside each other, and its rows below each other. Sums are laid out `apart` from row to row.
    """

    arithmetic: str
    rows: int
    columns: int
    terms: int
    left: int
    right: int
    apart: int
    beside: bool = False

    @property
    def sums(self) -> int:
        """Numbers of a thread."""
        return self.rows * self.columns * SHARE

    @property
    def registers(self) -> int:
        """Of a thread, beside its sums."""
        return Product(self.rows, self.columns, self.terms).registers

    def multiply(self, left: str, right: str) -> str:
        """sums += left x right, for all terms; given are the first of each in local memory."""
        size = f"{self.rows}x{self.columns}x{self.terms}"
        name = f"multiply_{size}_{self.arithmetic}_{self.left}_{self.right}{'_beside' if self.beside else ''}"
        # An access_ptr and no address, of which TVM thinks that nobody needs what is loaded from it.
        factors = (f'{of}.access_ptr("r", offset={at})' for of, at in (("near_left", left), ("near_right", right)))
        return _call(name, self._multiplying(name), 'sums.access_ptr("rw")', *factors)

    def store(self, which: str, target: str, at: str) -> str:
        """A matrix of sums into local memory, row by row."""
        name = f"store_{self._form.terms}_{self.apart}"
        # An address and no access_ptr, whose type TVM checks after it has let these numbers share others' memory.
        place = f"T.address_of({target}[{at}])"
        return _call(name, self._storing(name), place, f'sums.access_ptr("r", offset={which} * {SHARE})')

    @property
    def _form(self) -> Arithmetic:
        return ARITHMETICS[self.arithmetic]

    def _multiplying(self, name: str) -> str:
        form, shape = self._form, f"{SIDE}, {SIDE}, {self._form.terms}"
        layout, place = (
            ("row_major", f"i * {SIDE * self.left} + k")
            if self.beside
            else ("col_major", f"k * {self.left} + i * {SIDE}")
        )
        rounded = "for (int e = 0; e < {0}.num_elements; ++e) {0}.x[e] = __float_to_tf32({0}.x[e]);"
        return dedent(f"""\
            #include <mma.h>
            static __device__ __forceinline__ void {name}(
                float* sums, const {form.memory}* left, const {form.memory}* right) {{
              using namespace nvcuda::wmma;
              fragment<accumulator, {shape}, float> total[{self.rows}][{self.columns}];
              #pragma unroll
              for (int e = 0; e < {self.sums}; ++e)
                total[e / {SHARE} / {self.columns}][e / {SHARE} % {self.columns}].x[e % {SHARE}] = sums[e];
              #pragma unroll
              for (int k = 0; k < {self.terms}; k += {form.terms}) {{
                fragment<matrix_a, {shape}, {form.element}, {layout}> a[{self.rows}];
                fragment<matrix_b, {shape}, {form.element}, row_major> b[{self.columns}];
                #pragma unroll
                for (int i = 0; i < {self.rows}; ++i) {{
                  load_matrix_sync(a[i], left + {place}, {self.left});
                  {rounded.format("a[i]") if form.rounded else ""}
                }}
                #pragma unroll
                for (int j = 0; j < {self.columns}; ++j) {{
                  load_matrix_sync(b[j], right + k * {self.right} + j * {SIDE}, {self.right});
                  {rounded.format("b[j]") if form.rounded else ""}
                }}
                #pragma unroll
                for (int i = 0; i < {self.rows}; ++i)
                  #pragma unroll
                  for (int j = 0; j < {self.columns}; ++j) mma_sync(total[i][j], a[i], b[j], total[i][j]);
              }}
              #pragma unroll
              for (int e = 0; e < {self.sums}; ++e)
                sums[e] = total[e / {SHARE} / {self.columns}][e / {SHARE} % {self.columns}].x[e % {SHARE}];
            }}
            """)

    def _storing(self, name: str) -> str:
        return dedent(f"""\
            #include <mma.h>
            static __device__ __forceinline__ void {name}(float* to, const float* sums) {{
              using namespace nvcuda::wmma;
              fragment<accumulator, {SIDE}, {SIDE}, {self._form.terms}, float> total;
              #pragma unroll
              for (int e = 0; e < {SHARE}; ++e) total.x[e] = sums[e];
              store_matrix_sync(to, total, {self.apart}, mem_row_major);
            }}
            """)


def _call(name: str, source: str, *arguments: str) -> str:
    return f"T.evaluate(T.cuda.func_call({name!r}, {', '.join(arguments)}, source_code={source!r}))"


@dataclass(frozen=True)
class Product:
    """What a call multiplies, by the name of the function."""

    rows: int
    columns: int
    terms: int

    @property
    def float_ops(self) -> int:
        """Of one thread."""
        return 2 * SIDE * SIDE * self.rows * self.columns * self.terms // WARP

    @property
    def registers(self) -> int:
        return FACTOR * (self.rows + self.columns)


def product(called: str) -> Product | None:
    found = re.match(r"multiply_(\d+)x(\d+)x(\d+)_", called)
    return Product(*map(int, found.groups())) if found else None
