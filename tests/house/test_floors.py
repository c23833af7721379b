"""The house stands as CONTRIBUTING.md draws it: arrows point down, and nothing goes round in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOPS = ("saevit_tvm", "relay_patterns", "schedules", "tuning_logs", "benchmarks")
FRONT_DOOR = "saevit_tvm"

# Where words for kinds of target may stand: the backends, the targets, and two tables of programs that run without us.
KINDS = re.compile(r"""(["'])(llvm|opencl|cuda|metal|webgpu)\1""")
MAY_NAME_KINDS = ("saevit_tvm/backends/", "saevit_tvm/targets/", "saevit_tvm/runtime/devices.py")
TRAVELS_ALONE = "saevit_tvm/measure/offline.py"


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    files = [file for top in TOPS for file in (ROOT / top).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


MODULES = modules()


def floors() -> dict[str, int]:
    """The floor of each room, the top one first, as CONTRIBUTING.md has them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (table,) = re.findall(r"^    (cli, .*\n(?:    .*\n)*)", text, re.MULTILINE)
    return {room: floor for floor, names in enumerate(table.split("|")) for room in re.findall(r"\w+", names)}


FLOORS = floors()


def room(module: str) -> str:
    """`saevit_tvm.verbs.peers.onnx` is in the room `verbs`."""
    first, _, rest = module.partition(".")
    return rest.split(".")[0] if first == "saevit_tvm" and rest else first


def imported(module: str) -> Iterator[str]:
    """What of ours a module imports, wherever in it: at its top, in a function, or for type checkers only."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in TOPS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in TOPS:
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


ARROWS = {module: sorted(set(imported(module)) - {module}) for module in MODULES}


def test_every_room_has_a_floor() -> None:
    entries = {"saevit_tvm", "__main__"}
    assert {room(module) for module in MODULES} - entries == set(FLOORS)


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_arrows_point_down(name: str) -> None:
    """A room imports from lower floors only, and nothing inside imports the front door."""
    wrong = [
        f"{module} imports {other}"
        for module, others in ARROWS.items()
        for other in others
        if room(module) == name and room(other) != name
        if other == FRONT_DOOR or FLOORS[room(other)] <= FLOORS[name]
    ]
    assert not wrong


def test_no_circle_among_files() -> None:
    """Also inside a room: what cannot be imported first cannot be understood first."""
    left = {module: set(others) for module, others in ARROWS.items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left, "these files import each other"


def test_patterns_and_schedules_can_be_taken_alone() -> None:
    for module, others in ARROWS.items():
        if module.partition(".")[0] in ("relay_patterns", "schedules"):
            assert not [other for other in others if other.startswith("saevit_tvm")], module


def test_blocks_are_composed_of_primitives_which_know_none() -> None:
    """And machines are data: they know no kernel."""
    for module, others in ARROWS.items():
        if module.startswith("schedules.machines"):
            assert all(other.startswith("schedules.machines") for other in others), module
        elif ".primitives" in module:
            assert not [other for other in others if ".fused" in other], module
        elif module in ("schedules.spec", "schedules.activations", "schedules.dtypes"):
            assert not others, module


def test_kinds_of_target_are_named_in_their_tables_only() -> None:
    """Who needs to know what a kind means asks the backend. A program that travels alone has one table of its own."""
    named = {
        str(file.relative_to(ROOT)): len(KINDS.findall(file.read_text()))
        for module, file in MODULES.items()
        if not module.startswith("benchmarks")
    }
    wrong = {file: count for file, count in named.items() if count and not file.startswith(MAY_NAME_KINDS)}
    assert wrong == {TRAVELS_ALONE: 3}
