"""Reading `.pt2` archives as data.

PyTorch's own reader unpickles parts of the archive, evaluates its symbolic shapes and guards, imports what its
enums name and calls any function a node names (`torch.os.system`, say). Here open shapes are fixed (`pinning.py`), and
then the graph is checked: tensor operators on fixed shapes, plain names, raw tensors. Only what passed reaches
PyTorch, and nothing pickled does.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive import _package as archive

from saevit_tvm.models import inlining, pinning, widening
from saevit_tvm.support.errors import ModelError, UsageError

NAME = re.compile(r"[A-Za-z0-9_.]*")
TEXT = re.compile(r"[A-Za-z0-9_,> -]*")  # string arguments: "tanh", "ij,jk->ik"
OPERATOR = re.compile(r"torch\.ops\.aten\.([a-z_]\w*)\.([A-Za-z]\w*)", re.ASCII)
FILES = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|models/model\.json|extra/.*"
    r"|data/weights/(model_weights_config\.json|weight_\d+)"
    r"|data/constants/(model_constants_config\.json|tensor_\d+)|data/sample_inputs/model\.pt"
)
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
ODD_NUMBERS = ("Infinity", "-Infinity", "NaN")  # as JSON has them
CHECK = "torch.ops.aten._assert_tensor_metadata.default"  # of a precision, which may not stay
TRACE = "stack_trace"
CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
CONTEXT = re.compile(r"null|\[\]|\[\"\w+\"(, \"\w+\")*\]")


def load_program(
    path: Path, choose: pinning.Choose = lambda _extents, typical: typical, alone: bool = False
) -> torch.export.ExportedProgram:
    """The exported program with the shapes that are chosen for it, or one error that says why it is refused.

    `pinning.Alone` comes as it is, and `alone` is the way past it.
    """
    if not path.is_file():
        raise UsageError(f"there is no file '{path}': check the path.")
    try:
        reader = archive.PT2ArchiveReader(io.BytesIO(path.read_bytes()))
        names = reader.archive_file.get_all_records()
        program = json.loads(reader.read_string("models/model.json"))
        configs = [json.loads(reader.read_string(name)) for name in CONFIGS]
    except Exception as error:  # a damaged archive raises almost anything
        raise ModelError(f"'{path}' is not a readable .pt2 archive: save it with torch.export.save.") from error
    try:
        _check_files(names)
        for config in configs:
            _check_tensors(config)
        narrow = inlining.inline(program) or any(map(widening.has_narrow_weights, configs))
        _clean(program)
        if narrow:
            widening.widen(program)
        pinning.pin(program, choose, alone)
        _check(program)
    except (_Refused, pinning.Unpinnable) as refusal:
        raise ModelError(f"'{path}' is refused because it {refusal}.") from refusal
    except pinning.OutOfRange as refusal:
        if isinstance(refusal, pinning.Alone) and not alone:
            raise
        raise UsageError(f"'{path}' {refusal}: choose another --batch or --image-size.") from refusal
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ModelError(f"'{path}' does not hold a program of this PyTorch: export it again.") from error
    return _build(path, reader, program, narrow)


class _Refused(Exception):
    """What the archive does that it must not; the end of a sentence."""


def _check_files(names: list[str]) -> None:
    strange = sorted(name for name in names if not FILES.fullmatch(name))
    if strange or len(set(names)) != len(names):
        raise _Refused(f"holds more than one graph with its tensors ({', '.join(strange[:3])})")


def _check_tensors(config: dict[str, Any]) -> None:
    for name, tensor in config["config"].items():
        if tensor["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", tensor["path_name"]):
            raise _Refused(f"stores '{name}' as pickled code (nothing of it was executed)")
        _check(tensor["tensor_meta"])


def _clean(program: dict[str, Any]) -> None:
    """Drop what describes the program but is not needed to run it."""
    module = program["graph_module"]
    module["metadata"], module["treespec_namedtuple_fields"] = {}, {}
    module["module_call_graph"] = module["module_call_graph"][:1]
    module["graph"]["nodes"] = [node for node in module["graph"]["nodes"] if node["target"] != CHECK]
    for node in module["graph"]["nodes"]:
        trace = node["metadata"].get("stack_trace")  # where the operator stands in the source, as text
        node["metadata"] = {TRACE: trace} if isinstance(trace, str) else {}
    program["torch_version"] = torch.__version__


def _check(value: Any, key: str = "") -> None:
    """Every name, text, operator and container in the program, at any depth."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not NAME.fullmatch(name):
                raise _Refused(f"uses the name '{name}'")
            if name in ("as_graph", "as_operator", "as_custom_obj", "as_expr", "custom_obj"):
                raise _Refused(f"uses more than tensor operators on fixed shapes ({name[3:]})")
            _check(inner, name)
    elif isinstance(value, list):
        for inner in value:
            _check(inner, key)
    elif isinstance(value, str) and key == "target":
        _check_operator(value)
    elif isinstance(value, str) and key in ("in_spec", "out_spec"):
        _check_container(json.loads(value)[1])
    elif isinstance(value, str) and key == "as_float" and value in ODD_NUMBERS:
        pass
    elif isinstance(value, str) and key not in ("torch_version", TRACE):
        allowed = TEXT if key in ("as_string", "as_strings") else NAME
        if not allowed.fullmatch(value):
            raise _Refused(f"uses the text '{value[:40]}'")


def _check_operator(target: str) -> None:
    found = OPERATOR.fullmatch(target)
    operator = getattr(getattr(torch.ops.aten, found[1], None), found[2], None) if found else None
    if not isinstance(operator, torch._ops.OpOverload):
        raise _Refused(f"calls '{target[:60]}', which is not a tensor operator")
    if any(argument.name == "filename" for argument in operator._schema.arguments):
        raise _Refused(f"calls '{target}', which reads or writes files")


def _check_container(spec: dict[str, Any]) -> None:
    if spec["type"] not in CONTAINERS or not (spec["context"] is None or CONTEXT.fullmatch(spec["context"])):
        raise _Refused(f"takes or returns {spec['type']}: export a module that returns tensors, tuples or lists")
    for inner in spec["children_spec"]:
        _check_container(inner)


def _build(
    path: Path, reader: archive.PT2ArchiveReader, program: dict[str, Any], narrow: bool
) -> torch.export.ExportedProgram:
    from torch._export.serde import schema
    from torch._export.serde.serialize import ExportedProgramDeserializer, _dict_to_dataclass

    try:
        with _quiet():
            tensors: list[Any] = [archive._load_state_dict(reader, "model"), archive._load_constants(reader, "model")]
            if narrow:
                tensors = [{name: widening.widened(tensor) for name, tensor in each.items()} for each in tensors]
            return ExportedProgramDeserializer().deserialize(
                _dict_to_dataclass(schema.ExportedProgram, program), tensors[0], tensors[1]
            )
    except Exception as error:  # deserialising raises almost anything
        raise ModelError(
            f"'{path}' does not fit this PyTorch ({torch.__version__}): export it again with this one."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch logs what the error above already says."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
