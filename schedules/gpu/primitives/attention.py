"""Attention in one kernel: some queries of a head meet a tile of keys after the other, and no score leaves the chip.

Work-items (tx, ty): those of one ty share a few queries. Each computes the scores of some keys and mixes some columns
of the values; they meet in local memory, which holds the powers of one tile. The softmax goes along: with each tile
that has a larger score, what was mixed so far shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

from schedules.gpu.epilogue import Results, epilogue_reads
from schedules.gpu.launch import Buffer, Kernel, Limits, Memory, Program, blocks, nest
from schedules.gpu.primitives.rows import LOWEST, lanes_of, larger, power_of_two
from schedules.spec import Epilogue

SKEW = 4  # numbers between keys in local memory, so that those beside each other lie in different banks
MOST_PARTS = 16
FEW_REGISTERS = 64


@dataclass(frozen=True)
class Tiling:
    """Work-groups of `parts` by `rows` work-items, each of which has `queries` queries and `keys` keys of a tile.

    Keys and values are `staged` in local memory, or every work-item reads what it needs.
    """

    parts: int
    rows: int
    queries: int
    keys: int
    staged: int

    @property
    def block(self) -> int:
        """Queries of a work-group."""
        return self.rows * self.queries

    @property
    def tile(self) -> int:
        """Keys at a time."""
        return self.parts * self.keys


@dataclass(frozen=True)
class Attention(Kernel):
    """out = epilogue(softmax(scale * q k + mask) v) for every head, in float32 however tokens are stored."""

    n: int
    t: int  # queries
    s: int  # keys
    heads: int
    d: int  # width of a query and of a key
    dv: int  # width of a value
    scale: float
    mask: tuple[int, ...] = ()  # its four extents, some of which may be 1
    epilogue: Epilogue = field(default=Epilogue())
    dtype: str = "float32"
    given: str = "float32"  # how queries, keys and values are stored

    NAME = "attention"
    KNOBS = Tiling

    @property
    def reads(self) -> dict[str, Buffer]:
        tokens = {"queries": (self.t, self.d), "keys": (self.s, self.d), "values": (self.s, self.dv)}
        found = {name: Buffer((self.n, size, self.heads, width), self.given) for name, (size, width) in tokens.items()}
        # What no kernel of ours has computed is float32, and float16 would make infinities of large numbers.
        masks = {"mask": Buffer(self.mask)} if self.mask else {}
        return {**found, **masks, **epilogue_reads(self.epilogue, self.out, self.dv)}

    @property
    def out(self) -> Buffer:
        return Buffer((self.n, self.t, self.heads, self.dv), self.dtype)

    def offered(self, limits: Limits) -> list[Tiling]:
        parts = max(4, min(MOST_PARTS, power_of_two(blocks(self.dv, lanes_of(self.dv)))))
        rows = max(1, min(limits.wave // parts, self.t))
        queries = max(1, min(2 if limits.registers_per_item <= FEW_REGISTERS else 4, self.t // rows))
        keys = max(1, min(4, blocks(self.s, parts)))
        # Through local memory only where that is not main memory by another name, and several queries share it.
        shared = int(limits.local_is_fast and rows > 1)
        ways = (0, 1) if limits.local_is_fast else (0,)
        # The default, then what takes less.
        found = [Tiling(parts, rows, queries, keys, staged) for staged in range(shared, -1, -1)]
        found += [Tiling(parts, rows, 1, size, 0) for size in (2, 1)]
        for knobs in product((8, 16, 32), (2, 4, 8, 16), (1, 2, 4), (1, 2, 4), ways):
            if 32 <= knobs[0] * knobs[1] <= 256:
                found.append(Tiling(*knobs))
        return [*found, Tiling(32, 1, 1, 1, 0), Tiling(64, 1, 1, 1, 0)]

    def program(self, limits: Limits, tiling: Tiling) -> Program:
        body = _Body(self, tiling, self.memory(limits))
        lanes = max(lanes_of(self.d), lanes_of(self.dv))
        private = {"mix": tiling.queries * body.columns, "score": tiling.queries * tiling.keys}
        private |= {"query": tiling.queries * lanes_of(self.d), "near": lanes, "acc": 1}
        private |= {"top": tiling.queries, "total": tiling.queries}
        private |= {"more": body.lanes} if self.epilogue.operands else {}
        shared = {"power": tiling.block * tiling.tile, "most": tiling.block * tiling.parts}
        shared |= {"staged": tiling.tile * body.pitch} if tiling.staged else {}
        return Program(
            grid=(body.bands * self.heads, self.n),
            group=(tiling.parts, tiling.rows),
            body="\n".join(body.statements()),
            private=private,
            shared=shared,
        )


@dataclass(frozen=True)
class _Body:
    """The statements of an attention under one tiling; tile io of the keys is under way."""

    of: Attention
    tiling: Tiling
    memory: Memory

    @property
    def bands(self) -> int:
        """Work-groups of a head."""
        return blocks(self.of.t, self.tiling.block)

    @property
    def head(self) -> str:
        return f"(bx // {self.bands})"

    @property
    def line(self) -> str:
        """Query i of the work-item, of those of its group."""
        return f"(ty * {self.tiling.queries} + i)"

    @property
    def token(self) -> str:
        """Query i of the work-item, of all."""
        return f"(bx % {self.bands} * {self.tiling.block} + {self.line})"

    @property
    def nearest(self) -> str:
        """A query that is there: beyond the edge it is the last one once more, as all of a group must meet."""
        return f"T.min({self.token}, {self.of.t - 1})" if self.of.t % self.tiling.block else self.token

    @property
    def local_key(self) -> str:
        """Key j of the work-item, of those of the tile."""
        return f"(j * {self.tiling.parts} + tx)"

    def key(self, local: str) -> str:
        return f"(io * {self.tiling.tile} + {local})"

    @property
    def uneven(self) -> bool:
        """Whether the last tile is partly filled."""
        return self.of.s % self.tiling.tile > 0

    @property
    def lanes(self) -> int:
        """Of a value."""
        return lanes_of(self.of.dv)

    @property
    def turns(self) -> int:
        """Of a work-item over a value."""
        return blocks(self.of.dv, self.tiling.parts * self.lanes)

    @property
    def columns(self) -> int:
        """Numbers that a work-item mixes of a query."""
        return self.turns * self.lanes

    @property
    def column(self) -> str:
        """The first in turn c."""
        return f"((c * {self.tiling.parts} + tx) * {self.lanes})"

    @property
    def mixed(self) -> str:
        return f"mix[i * {self.columns} + c * {self.lanes} + v]"

    @property
    def pitch(self) -> int:
        """Numbers from one token to the next in local memory."""
        return max(self.of.d, self.of.dv) + SKEW

    def statements(self) -> list[str]:
        tiling = self.tiling
        largest = self.each_key(f"acc[0] = {larger('acc[0]', self.score)}")
        tile = [
            *self.staging("keys", self.of.d),
            self.scores(),
            self.each_query(f"acc[0] = {LOWEST}", largest, self.put),
            self.each_query(*self.powers()),
            *self.staging("values", self.of.dv),
            self.mix(),
        ]
        return [
            self.each_query(f"top[i] = {LOWEST}", "total[i] = T.float32(0)"),
            nest(f"for e in T.unroll({tiling.queries * self.columns}):", "mix[e] = T.float32(0)"),
            nest(f"for io in range({blocks(self.of.s, tiling.tile)}):", *tile),
            self.each_query("acc[0] = total[i]", self.put),
            self.each_query(*self.finish()),
        ]

    def each_query(self, *statements: str) -> str:
        return nest(f"for i in T.unroll({self.tiling.queries}):", *statements)

    def each_key(self, *statements: str) -> str:
        """Of the work-item, in the tile, that are there."""
        if self.uneven:
            statements = (nest(f"if {self.key(self.local_key)} < {self.of.s}:", *statements),)
        return nest(f"for j in T.unroll({self.tiling.keys}):", *statements)

    def each_column(self, *statements: str) -> str:
        if self.of.dv % (self.tiling.parts * self.lanes):
            statements = (nest(f"if {self.column} < {self.of.dv}:", *statements),)
        return nest(f"for c in T.unroll({self.turns}):", *statements)

    def each_lane(self, statement: str) -> str:
        return nest(f"for v in T.unroll({self.lanes}):", statement)

    # Tokens in memory -------------------------------------------------

    def place(self, tokens: int, token: str, width: int) -> str:
        """Where the head's part of a token begins."""
        return f"((by * {tokens} + {token}) * {self.of.heads} + {self.head}) * {width}"

    def staging(self, name: str, width: int) -> list[str]:
        """A tile of keys or values into local memory; all work-items of the group bring some."""
        if not self.tiling.staged:
            return []
        lanes, items = lanes_of(width), self.tiling.parts * self.tiling.rows
        count = self.tiling.tile * width // lanes
        at = f"(e * {items} + ty * {self.tiling.parts} + tx)"
        local, column = f"({at} // {width // lanes})", f"({at} % {width // lanes} * {lanes})"
        start = f"{self.place(self.of.s, self.key(local), width)} + {column}"
        put = f"staged[{local} * {self.pitch} + {column} + v] = near[v]"
        brought = [self.memory.load_lanes("near", "0", name, start, lanes), nest(f"for v in T.unroll({lanes}):", put)]
        inside = f"{at} < {count} and {self.key(local)} < {self.of.s}"
        return [nest(f"for e in range({blocks(count, items)}):", nest(f"if {inside}:", *brought))]

    def load(self, name: str, width: int, local: str, column: str) -> str:
        """Some numbers of a key or value of the tile into `near`."""
        lanes = lanes_of(width)
        if self.tiling.staged:
            number = f"near[v] = staged[{local} * {self.pitch} + {column} + v]"
            return nest(f"for v in T.unroll({lanes}):", number)
        start = f"{self.place(self.of.s, self.key(local), width)} + {column}"
        return self.memory.load_lanes("near", "0", name, start, lanes)

    # Scores and powers ------------------------------------------------

    @property
    def score(self) -> str:
        return f"score[i * {self.tiling.keys} + j]"

    @property
    def put(self) -> str:
        """What the work-item has to say of query i, for those that share it."""
        return f"most[{self.line} * {self.tiling.parts} + tx] = acc[0]"

    def scores(self) -> str:
        """Of the work-item's queries and keys."""
        of, lanes = self.of, lanes_of(self.of.d)
        column = f"ii * {lanes}"
        query = self.memory.load_lanes(
            "query", f"i * {lanes}", "queries", f"{self.place(of.t, self.nearest, of.d)} + {column}", lanes
        )
        product = nest(
            f"for v in T.unroll({lanes}):", f"{self.score} = {self.score} + query[i * {lanes} + v] * near[v]"
        )
        terms = nest(
            f"for ii in range({of.d // lanes}):",
            self.each_query(query),
            self.each_key(self.load("keys", of.d, self.local_key, column), self.each_query(product)),
        )
        clear = nest(f"for e in T.unroll({self.tiling.queries * self.tiling.keys}):", "score[e] = T.float32(0)")
        scaled = f"{self.score} = {self.score} * T.float32({of.scale!r}) {self.masked()}"
        return "\n".join([clear, terms, self.each_query(self.each_key(scaled))])

    def masked(self) -> str:
        """The mask, along which extents of 1 are repeated."""
        of = self.of
        if not of.mask:
            return ""
        places = ("by", self.head, self.nearest, self.key(self.local_key))
        index = "0"
        for extent, place in zip(of.mask, places, strict=True):
            index = f"({index} * {extent} + {place if extent > 1 else 0})"
        return f"+ {self.memory.load('mask', index)}"

    def powers(self) -> list[str]:
        """Of the tile, for query i, whose largest score is known now: what the tiles before gave shrinks by as much."""
        parts, mix = self.tiling.parts, f"mix[i * {self.columns} + e]"
        found = f"most[{self.line} * {parts} + p]"
        return [
            "acc[0] = top[i]",
            nest(f"for p in range({parts}):", f"top[i] = {larger('top[i]', found)}"),
            "acc[0] = T.exp(acc[0] - top[i])",
            "total[i] = total[i] * acc[0]",
            nest(f"for e in T.unroll({self.columns}):", f"{mix} = {mix} * acc[0]"),
            self.each_key(
                f"{self.score} = T.exp({self.score} - top[i])",
                f"total[i] = total[i] + {self.score}",
                f"power[{self.line} * {self.tiling.tile} + {self.local_key}] = {self.score}",
            ),
        ]

    # Values -----------------------------------------------------------

    def mix(self) -> str:
        of, tile = self.of, self.tiling.tile
        power = f"power[{self.line} * {tile} + key]"
        product = self.each_query(self.each_lane(f"{self.mixed} = {self.mixed} + {power} * near[v]"))
        mixed = self.each_column(self.load("values", of.dv, "key", self.column), product)
        if self.uneven:
            # Beyond the last key there is nothing, which is not no share of what is there: that might be NaN.
            mixed = nest(f"if {self.key('key')} < {of.s}:", mixed)
        return nest(f"for key in range({tile}):", mixed)

    def finish(self) -> list[str]:
        """The results of query i, and away with them."""
        of, parts = self.of, self.tiling.parts
        target = f"{self.place(of.t, self.token, of.dv)} + {self.column}"
        results = Results(self.memory, self.lanes, self.mixed, f"{self.column} + v", target)
        at = f"i * {self.columns} + c * {self.lanes}"
        stored = self.each_column(
            self.each_lane(f"{self.mixed} = {self.mixed} / acc[0]"),
            *results.through(of.epilogue.steps),
            self.memory.store_lanes("out", target, "mix", at, self.lanes),
        )
        return [
            "acc[0] = T.float32(0)",
            nest(f"for p in range({parts}):", f"acc[0] = acc[0] + most[{self.line} * {parts} + p]"),
            nest(f"if {self.token} < {of.t}:", stored),
        ]
