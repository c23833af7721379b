"""SAA for batches: what multiplies matrices becomes convolutions, and these kernels are what is left of it.

Between kernels, tokens lie by channel, then by image: those of a batch are the columns of one matrix, for a convolution
the positions of one image of a single row. So weights are read once for many images, on tensor cores where there are
any. At rate 1 the projection gives the image itself and adds the residual.

* sample as for few images, or, at rate 1, normalise: the layer norm without its affine part, which is in the weights
* mix, after qkv: a work-group a head of an image; its keys and values in local memory
* spread, after the projection: a work-item a few positions of a window; its token, over the window, and the residual

Everything in here is computed in float32, whatever is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from schedules.gpu.fused.saa import SAA, Items, Moments, Sample, mixed
from schedules.gpu.launch import Buffer, Kernel, Limits, Lone, Program, blocks, nest
from schedules.gpu.primitives import reduce

GROUPS = (32, 64, 128, 256)
SKEW = 4  # numbers between tokens in local memory: few of those that are written together share a bank


@dataclass(frozen=True)
class Columns(SAA):
    """Tokens of all images, side by side."""

    @property
    def all_tokens(self) -> int:
        return self.n * self.tokens

    def matrix_of(self, channels: int) -> Buffer:
        """As the convolutions see it: one image of one row."""
        return Buffer((1, channels, 1, self.all_tokens), self.dtype)

    def column(self, channel: str, image: str, token: str) -> str:
        return f"({channel} * {self.n} + {image}) * {self.tokens} + {token}"


@dataclass(frozen=True)
class BatchSample(Columns, Sample):
    """The same tokens, elsewhere."""

    NAME = "saa_batch_sample"

    @property
    def out(self) -> Buffer:
        return self.matrix_of(self.c)

    def place(self, channel: str, token: str) -> str:
        return self.column(channel, "by", token)


@dataclass(frozen=True)
class Normalise(Columns, Lone):
    """out = (x - mean) / deviation over channels, where every position is a token."""

    NAME = "saa_normalise"
    KNOBS = reduce.Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        return {"x": self.image}

    @property
    def out(self) -> Buffer:
        return self.matrix_of(self.c)

    def offered(self, limits: Limits) -> list[reduce.Tiling]:
        return reduce.shares(self.all_tokens, limits)

    def program(self, limits: Limits, tiling: reduce.Tiling) -> Program:
        side, memory, items = tiling.side, self.memory(limits), Items(tiling.side * tiling.parts)
        moments = Moments(self, items, side, tiling.parts)
        column, position = f"(bx * {side} + {moments.position})", moments.position
        inside = f"{column} < {self.all_tokens}"

        def element(channel: str) -> str:
            plane = f"({column} // {self.tokens} * {self.c} + {channel}) * {self.tokens}"
            return memory.load("x", f"{plane} + {column} % {self.tokens}")

        channel = f"({items.at} // {side})"
        normal = f"({element(channel)} - means[{position}]) * scales[{position}]"
        stored = memory.store("out", f"{channel} * {self.all_tokens} + {column}", normal)
        body = [
            *moments.statements(element(moments.channel), inside=inside),
            items.each(self.c * side, nest(f"if {inside}:", stored)),
        ]
        return Program(
            grid=(blocks(self.all_tokens, side),),
            group=(items.group,),
            body="\n".join(body),
            private=moments.private,
            shared=moments.shared,
        )


@dataclass(frozen=True)
class Near:
    """Work-items of a work-group, and numbers between tokens in its local memory."""

    group: int
    skew: int


@dataclass(frozen=True)
class Mix(Columns, Lone):
    """Of queries, keys and values: the values of each head, mixed by the softmax of the scores."""

    NAME = "saa_mix"
    KNOBS = Near

    @property
    def reads(self) -> dict[str, Buffer]:
        return {"qkv": self.matrix_of(3 * self.c)}

    @property
    def out(self) -> Buffer:
        """At rate 1 the projection gives the image, and wants one."""
        return self.image if self.r == 1 else self.matrix_of(self.c)

    def place(self, channel: str, token: str) -> str:
        if self.r == 1:
            return f"(bx * {self.c} + {channel}) * {self.tokens} + {token}"
        return self.column(channel, "bx", token)

    def offered(self, limits: Limits) -> list[Near]:
        # A work-item a token. Only what is faster than main memory has banks to think of.
        group = next((size for size in GROUPS if size >= self.tokens), GROUPS[-1])
        skews = (SKEW, 0) if limits.local_is_fast else (0,)
        return [Near(*knobs) for knobs in product((group, *GROUPS), skews)]

    def program(self, limits: Limits, tiling: Near) -> Program:
        memory, items = self.memory(limits), Items(tiling.group)
        tokens, dim, pair = self.tokens, self.dim, 2 * self.dim + tiling.skew

        def loaded(third: int) -> str:
            """A number of a token's query, key or value: neighbouring work-items have neighbouring tokens."""
            return memory.load("qkv", self.column(f"({third * self.c} + by * {dim} + j)", "bx", items.at))

        brought = [f"pairs[{items.at} * {pair} + {at} + j] = {loaded(third)}" for at, third in ((0, 1), (dim, 2))]
        query = f"q[j] = {loaded(0)}"
        stored = memory.store("out", self.place(f"(by * {dim} + j)", items.at), "mix[j] / total[0]")
        body = [
            items.each(tokens, nest(f"for j in T.unroll({dim}):", *brought)),
            items.each(tokens, nest(f"for j in T.unroll({dim}):", query), *mixed(self, pair, stored)),
        ]
        return Program(
            grid=(self.n, self.heads),
            group=(tiling.group,),
            body="\n".join(body),
            private={"acc": 1, "top": 1, "total": 1, "q": dim, "mix": dim},
            shared={"pairs": tokens * pair - tiling.skew},
        )


@dataclass(frozen=True)
class Part:
    """Work-groups of `group` work-items, each with `wide` positions of one window beside each other."""

    group: int
    wide: int


@dataclass(frozen=True)
class Spread(Columns, Kernel):
    """out = x + whole * up_w + up_b; `whole` is one number a window, `up_w` one for each position in it."""

    NAME = "saa_spread"
    KNOBS = Part

    @property
    def reads(self) -> dict[str, Buffer]:
        up_w = self.matrix(self.c, self.r, self.r)
        return {"x": self.image, "whole": self.matrix_of(self.c), "up_w": up_w, "up_b": self.vector}

    @property
    def out(self) -> Buffer:
        return self.image

    def offered(self, limits: Limits) -> list[Part]:
        widths = [wide for wide in (4, 2, 1) if self.w % wide == 0 and self.r % wide == 0]
        return [Part(limits.wave, widths[0]), *(Part(*knobs) for knobs in product(GROUPS, widths))]

    def program(self, limits: Limits, tiling: Part) -> Program:
        memory, wide = self.memory(limits), tiling.wide
        count, item = self.area // wide, f"(bx * {tiling.group} + tx)"
        row, column = f"({item} // {self.w // wide})", f"({item} % {self.w // wide} * {wide})"
        at = f"(bz * {self.c} + by) * {self.area} + {item} * {wide}"
        token = self.column("by", "bz", f"{row} // {self.r} * {self.columns} + {column} // {self.r}")
        inside = f"by * {self.window} + {row} % {self.r} * {self.r} + {column} % {self.r}"
        body = [
            f"token[0] = {memory.load('whole', token)}",
            memory.load_lanes("weight", "0", "up_w", inside, wide),
            memory.load_lanes("near", "0", "x", at, wide),
            nest(f"for v in T.vectorized({wide}):", "near[v] = near[v] + (token[0] * weight[v] + up_b[by])"),
            memory.store_lanes("out", at, "near", "0", wide),
        ]
        return Program(
            grid=(blocks(count, tiling.group), self.c, self.n),
            group=(tiling.group,),
            body=nest(f"if {item} < {count}:", *body),
            private={"token": 1, "weight": wide, "near": wide},
        )
