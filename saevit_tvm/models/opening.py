"""Opening a model, wherever it comes from: a registered name, `timm:NAME`, a `.pt2` or a `.onnx`.

Everything after this room sees one `ModelSource`: what to compile, what to compare with, what to tell the user.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from saevit_tvm import models
from saevit_tvm.models import timm_weights
from saevit_tvm.models import weights as weight_files
from saevit_tvm.models.onnx_session import exact_session
from saevit_tvm.runtime.preprocess import normalised
from saevit_tvm.runtime.tensors import Inputs, TensorSpec, drawn, layout, pictures, shown
from saevit_tvm.support.errors import ModelError, UsageError, unknown
from schedules.dtypes import MOST_MOVES

IMAGE_SIZE = 224
CHANNELS = 3  # of a picture
TYPICAL = {"NCHW": (1, CHANNELS, IMAGE_SIZE, IMAGE_SIZE), "NHWC": (1, IMAGE_SIZE, IMAGE_SIZE, CHANNELS)}
RANK = 4  # of pictures
SMALLEST, LARGEST = 32, 4096  # below the total stride the last stage has no whole cell
LARGEST_BATCH = 1024
INDICES = ("int32", "int64")  # may be places in a table
BOUNDS = (256, 64, 16, 4, 2, 1)
INPUT_DTYPES = ("float32", "float16", "uint8", *INDICES, "bool")
OUTPUT_DTYPES = (*INPUT_DTYPES, "int8")
ALIKE, MOSTLY = 1e-4, 0.99  # of the largest value; a decision may turn
STORING = ("DynamicQuantizeLinear", "QuantizeLinear")  # operators of ONNX that round to a few bits
FLOAT, FRAMES = "float32", "uint8"  # what a library may take for a picture
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
Size = tuple[int, int]

NARROW = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ModelSource:
    """A model with its weights, at one input shape."""

    name: str
    module: Any  # a PyTorch module that answers with tensors, in eval mode; None for .onnx
    inputs: tuple[TensorSpec, ...]
    output_names: tuple[str, ...]
    recipe: dict[str, Any]
    weights: dict[str, Any]
    weights_digest: str
    graph_digest: str | None  # with the weights' it names all that an import depends on; None where nothing does
    preprocessing: dict[str, Any]
    labels: tuple[str, ...] | None = None
    regions: dict[str, int] = dataclasses.field(default_factory=dict)
    program: torch.export.ExportedProgram | None = None  # that the module is of, where it came as one
    onnx: Any = None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of the first input, which mostly is the only one."""
        return self.inputs[0].shape

    @property
    def takes_frames(self) -> bool:
        """Whether its library is to take frames of a camera, uint8 and channels last, in place of the model's input."""
        return self.recipe.get("input") == FRAMES

    @property
    def library_inputs(self) -> tuple[TensorSpec, ...]:
        """What its library takes."""
        if not self.takes_frames:
            return self.inputs
        batch, (height, width) = self.input_shape[0], self.preprocessing["image_size"]
        return (TensorSpec(self.inputs[0].name, (batch, height, width, CHANNELS), FRAMES),)

    def prepared(self, *given: np.ndarray) -> tuple[np.ndarray, ...]:
        """The model's own inputs for what its library is given."""
        return (normalised(given[0], self.preprocessing),) if self.takes_frames else given

    def reference(self, *given: np.ndarray) -> list[np.ndarray]:
        """What the original computes, in float32, for what its library is given."""
        return self.original(*self.prepared(*given))

    def original(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """What the original computes for its own inputs."""
        try:
            return self.tried(*inputs)
        except Exception as error:  # a model fails in its own way
            raise ModelError(
                f"'{self.name}' does not run on every input ({_brief(error)}), so nothing can be compared with it: "
                "let it take nothing that has to be of certain values, and try again."
            ) from error

    def tried(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """The same; where it fails, its own error."""
        if self.onnx is not None:
            names = [given.name for given in self._session.get_inputs()]
            return self._session.run(None, dict(zip(names, inputs, strict=True)))
        with torch.no_grad():
            outputs = self.module(*(torch.from_numpy(np.asarray(x, order="C")) for x in inputs))
        return [output.resolve_neg().numpy() for output in tree_leaves(outputs)]

    def exported(self) -> torch.export.ExportedProgram:
        """The graph that the compiler imports (there is none for .onnx, which is a graph already)."""
        if self.program is not None:
            given = self.program  # which whoever takes it apart changes
            return given._update(
                given.graph_module, copy.deepcopy(given.graph_signature), constants=dict(given.constants)
            )
        with torch.no_grad():
            return torch.export.export(self.module, tuple(map(torch.from_numpy, self.zeros())), strict=False)

    def zeros(self) -> tuple[np.ndarray, ...]:
        """Inputs that every model takes."""
        return tuple(np.zeros(spec.shape, spec.dtype) for spec in self.inputs)

    @property
    def remedy(self) -> str | None:
        """What helps where a library computes something else, if the reason may be the model's own."""
        if self.onnx is None or not any(node.op_type in STORING for node in self.onnx.graph.node):
            return None
        return (
            "it stores numbers in few bits, and those that rounding turns add up; give the model that was not quantized"
        )

    def moves(self, inputs: Inputs, share: float) -> float:
        """By which share the answer moves when what is given moves by a share; 0 where that says nothing.

        It does of a model that stores numbers in few bits: what is on the border between two of them is stored as
        rounding has it, and turns others. No library can be nearer to the original than the original is to itself.
        """
        if self.remedy is None:
            return 0.0
        stream, moved = np.random.RandomState(0), []
        for each in inputs:
            near = each + share * np.abs(each).max(initial=0) * stream.uniform(-1, 1, each.shape)
            moved.append(near.astype(each.dtype) if each.dtype.kind == "f" else each)
        answers = zip(self.original(*moved), self.original(*inputs), strict=True)
        found = max(_apart(a, e) if e.dtype.kind == "f" else float(np.mean(a != e)) for a, e in answers)
        return found if found <= MOST_MOVES else 0.0

    def rounds(self, dtype: str, inputs: Inputs) -> float:
        """By which share PyTorch's own answer is off in a type of 16 bits; 0 where that says nothing."""
        if self.onnx is not None or dtype not in NARROW:
            return 0.0
        given = map(torch.from_numpy, inputs)
        try:
            narrow = copy.deepcopy(self.module).to(NARROW[dtype])
            with torch.no_grad():
                answers = tree_leaves(narrow(*(x.to(NARROW[dtype]) if x.is_floating_point() else x for x in given)))
        except (RuntimeError, TypeError):  # operators that PyTorch has for float32 alone
            return 0.0
        pairs = zip(answers, self.original(*inputs), strict=True)
        found = max((_apart(a.float().numpy(), e) for a, e in pairs if e.dtype.kind == "f"), default=0.0)
        return found if found <= MOST_MOVES else 0.0

    @property
    def weight_bytes(self) -> int:
        if self.onnx is not None:
            return self.onnx.ByteSize()
        return sum(tensor.numel() * tensor.element_size() for tensor in self.module.state_dict().values())

    @cached_property
    def _session(self) -> Any:
        return exact_session(self.onnx)


def _apart(a: np.ndarray, e: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - e).max(initial=0) / (np.abs(e).max(initial=0) or 1.0))


def open_model(
    model: str = "saevit_xs",
    *,
    weights: str | Path | None = None,
    batch: int = 1,
    image_size: int | Sequence[int] | None = None,
    num_classes: int | None = None,
    features_only: bool = False,
    seed: int = 0,
    pretrained: bool = False,
    input_dtype: str = FLOAT,
) -> ModelSource:
    """A model by name or file. Without `weights` a named model gets random ones, alike for the same seed.

    With `pretrained`, a model of timm's gets the trained weights that timm names for it. With uint8 as `input_dtype`, a
    model's library takes frames of a camera and does the preprocessing itself.
    """
    if input_dtype not in (FLOAT, FRAMES):
        raise unknown("input", input_dtype, [FLOAT, FRAMES])
    source = _opened(model, weights, batch, image_size, num_classes, features_only, seed, pretrained)
    return _with_frames(source) if input_dtype == FRAMES else source


def _opened(
    model: str,
    weights: str | Path | None,
    batch: int,
    image_size: int | Sequence[int] | None,
    num_classes: int | None,
    features_only: bool,
    seed: int,
    pretrained: bool,
) -> ModelSource:
    size = None if image_size is None else _checked_size(image_size)
    if not 1 <= batch <= LARGEST_BATCH:
        raise UsageError(f"batch {batch} is impossible: choose 1 to {LARGEST_BATCH}.")
    if num_classes is not None and num_classes < 1:
        raise UsageError(f"{num_classes} classes are impossible: choose 1 or more.")
    if pretrained and weights is not None:
        raise UsageError("--pretrained and --weights are two sources of weights: leave one out.")
    if pretrained and not model.startswith("timm:"):
        raise UsageError(f"--pretrained is for models of timm's, and '{model}' is none: give --weights, or timm:NAME.")
    if model in models.names():
        return _open_registered(model, weights, batch, size, num_classes, features_only, seed)
    if model.startswith("timm:"):
        return _open_timm(model, weights, batch, size, num_classes, features_only, seed, pretrained)
    opener = {".pt2": _open_pt2, ".onnx": _open_onnx}.get(Path(model).suffix)
    if opener is None:
        raise unknown("model", model, [*models.names(), "timm:NAME", "FILE.pt2", "FILE.onnx"])
    if num_classes is not None or features_only:
        raise UsageError(f"'{model}' has its outputs fixed: leave out the number of classes and features only.")
    # An artifact remembers only the name of the file, so `weights` may say where it is now.
    path = Path(model if weights is None else weights)
    if path.name != Path(model).name:
        raise UsageError(f"'{model}' holds its own weights: leave out '{weights}'.")
    return opener(path, batch, size)


def _with_frames(source: ModelSource) -> ModelSource:
    if not source.preprocessing:
        raise UsageError(
            f"'{source.name}' takes no RGB pictures, so nothing says what a frame is to become: give --input float32."
        )
    return dataclasses.replace(source, recipe=source.recipe | {"input": FRAMES})


# Registered models --------------------------------------------------


def _open_registered(
    name: str,
    weights: str | Path | None,
    batch: int,
    size: Size | None,
    num_classes: int | None,
    features_only: bool,
    seed: int,
) -> ModelSource:
    checkpoint = None if weights is None else Checkpoint.open(weights)
    if checkpoint is not None:
        checkpoint.check_made_for(name)
        size = size or checkpoint.image_size
        num_classes = num_classes or checkpoint.num_classes
    size, num_classes = size or (IMAGE_SIZE, IMAGE_SIZE), num_classes or 1000
    if min(size) < SMALLEST:
        raise UsageError(f"image size {_show(size)} is too small for {name}: choose {SMALLEST} or more.")
    module = models.create(name, num_classes=num_classes, features_only=features_only).eval()
    if checkpoint is None:
        weight_files.randomise(module, seed)
    else:
        checkpoint.apply_to(module)
    blocks = sum(module.depths)
    recipe = _recipe(name, batch, size, num_classes, features_only)
    return ModelSource(
        name=name,
        module=module,
        inputs=_one_input((batch, 3, *size)),
        output_names=tuple(f"stage{i + 1}" for i in range(4)) if features_only else ("logits",),
        recipe=recipe,
        weights={"source": "random", "seed": seed} if checkpoint is None else checkpoint.origin,
        weights_digest=weight_files.digest(module),
        graph_digest=_code_digest(recipe, module),
        preprocessing=_preprocessing(size, checkpoint),
        labels=None if checkpoint is None or features_only else checkpoint.labels(num_classes),
        regions={"saa": blocks, "ciffn": blocks, "dwsconv": blocks},
    )


@dataclass(frozen=True)
class Checkpoint:
    """A weights file and what its metadata says of it."""

    label: str
    origin: dict[str, str]
    state: dict[str, Tensor]
    metadata: dict[str, str]

    @staticmethod
    def open(given: str | Path) -> Checkpoint:
        """A file, or the name of a checkpoint that ships with the package; such a file comes first."""
        path, shipped = Path(given), weight_files.shipped()
        if not path.exists() and str(given) in shipped:
            origin = {"source": "shipped", "name": str(given)}
            return Checkpoint(f"checkpoint '{given}'", origin, *weight_files.load_state(shipped[str(given)]))
        if not path.exists() and not path.suffix:
            raise unknown("checkpoint", str(given), [*shipped, "a path to a .safetensors or .pt file"])
        return Checkpoint(f"'{given}'", {"source": "file", "file": path.name}, *weight_files.load_state(path))

    def check_made_for(self, name: str) -> None:
        made_for = self.metadata.get("saevit.model", name)
        if made_for != name:
            raise ModelError(f"{self.label} holds weights of {made_for}, not of {name}: add --model {made_for}.")

    def apply_to(self, module: nn.Module) -> None:
        own = module.state_dict()
        features_only = getattr(module, "features_only", False)
        state = {n: t for n, t in self.state.items() if n in own or not (features_only and _of_head(n))}
        weight_files.apply_state(module, state, self.label)

    @property
    def num_classes(self) -> int | None:
        """The rows of the classifier, which is the truth, whatever the metadata says."""
        head = self.state.get("head.weight")
        return None if head is None or head.dim() != 2 else head.shape[0]

    @property
    def image_size(self) -> Size | None:
        return self._read("saevit.image_size", lambda value: _checked_size(value))

    @property
    def preprocessing(self) -> dict[str, Any]:
        return self._read("saevit.preprocessing", _checked_preprocessing) or {}

    def labels(self, num_classes: int) -> tuple[str, ...] | None:
        return self._read("saevit.labels", lambda value: _checked_labels(value, num_classes))

    def _read(self, key: str, check: Callable[[Any], Any]) -> Any:
        if key not in self.metadata:
            return None
        try:
            return check(json.loads(self.metadata[key]))
        except (ValueError, TypeError, KeyError, RecursionError, UsageError) as error:
            raise ModelError(f"{self.label} has metadata '{key}' that makes no sense: {error}.") from error


def _of_head(name: str) -> bool:
    return name.startswith(("norm.", "head."))


# Foreign models -----------------------------------------------------


def _open_timm(
    name: str,
    weights: str | Path | None,
    batch: int,
    size: Size | None,
    num_classes: int | None,
    features_only: bool,
    seed: int,
    pretrained: bool,
) -> ModelSource:
    timm = _import("timm", f"'{name}' needs timm: pip install timm torchvision.")
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if features_only:
        options = {"features_only": True}
    known = name.removeprefix("timm:")
    if not timm.is_model(known):
        near = difflib.get_close_matches(known, timm.list_models(), n=3)
        raise UsageError(f"timm has no model '{known}'{'; near it are ' + ', '.join(near) if near else ''}.")
    checkpoint = None if weights is None else Checkpoint.open(weights)
    trained = timm_weights.fetch(known, num_classes) if pretrained else None
    try:
        module, made_for = _timm_model(
            timm, known, options | (trained.options if trained else {"pretrained": False}), size
        )
        own = getattr(module, "pretrained_cfg", {})
        native = tuple(own.get("input_size", (3, IMAGE_SIZE, IMAGE_SIZE))[1:])
        if checkpoint is None and trained is None:
            weight_files.randomise(module, seed, made_for or native)
            weight_files.calm(module, made_for or native)
    except Exception as error:  # every architecture refuses in its own way
        asked = f"with {options}" if size is None else f"at {_show(size)} with {options}"
        hint = "" if size is None else "; leave out the image size, or choose another"
        raise ModelError(f"timm cannot make '{known}' {asked}: {_brief(error)}{hint}.") from error
    origin: dict[str, Any] = {"source": "random", "seed": seed}
    if trained is not None:
        origin = {"source": "pretrained", "from": trained.origin}
    if checkpoint is not None:
        checkpoint.check_made_for(name)
        checkpoint.apply_to(module)
        origin = checkpoint.origin
    shape = (batch, 3, *(size or native))
    custom: dict[str, Any] = {key: list(own[key]) for key in ("mean", "std") if key in own}
    if own.get("interpolation") in ("bilinear", "bicubic"):
        custom["resize"] = own["interpolation"]
    if own.get("crop_pct"):
        custom |= {"crop_pct": own["crop_pct"], "crop": "none" if own.get("crop_mode") == "squash" else "center"}
    recipe = _recipe(name, batch, shape[2:], num_classes, features_only)
    return _foreign(
        name=name,
        module=module,
        inputs=_one_input(shape),
        recipe=recipe,
        weights=origin,
        weights_digest=weight_files.digest(module),
        graph_digest=_code_digest(recipe, module),
        preprocessing=_preprocessing(shape[2:], checkpoint, custom),
        labels=trained.labels() if trained and not features_only else None,
    )


def _timm_model(timm: Any, name: str, options: dict[str, Any], size: Size | None) -> tuple[Any, Size | None]:
    """The model, and the size that it is made for where its weights depend on that (embeddings of positions, say)."""
    if size is not None:
        try:
            return timm.create_model(name, img_size=size, **options).eval(), size
        except TypeError:  # it takes pictures of any size
            pass
    return timm.create_model(name, **options).eval(), None


def open_program(program: torch.export.ExportedProgram, name: str = "program", **fields: Any) -> ModelSource:
    """A program of torch.export, all of whose extents are fixed."""
    user = program.graph_signature.user_inputs
    given = {node.name: node.meta.get("val") for node in program.graph.nodes if node.name in user}
    if not given or not all(isinstance(value, Tensor) for value in given.values()):
        raise ModelError(f"'{name}' must take tensors and nothing else: export it so.")
    inputs = [(key, value.shape, str(value.dtype).removeprefix("torch.")) for key, value in given.items()]
    digest = weight_files.digest_tensors({**program.state_dict, **program.constants})
    return _of_file(name, inputs, module=program.module(), program=program, weights_digest=digest, **fields)


def _open_pt2(path: Path, batch: int, size: Size | None) -> ModelSource:
    from saevit_tvm.models.pinning import Alone
    from saevit_tvm.models.pt2 import load_program

    def opened(batch: int, alone: bool = False) -> ModelSource:
        program = load_program(path, lambda extents, typical: _shapes(path, extents, typical, batch, size), alone)
        if _is_training(program):
            raise ModelError(f"'{path}' was exported in training mode: call eval() before torch.export.export.")
        return open_program(program, str(path), graph_digest=hashlib.sha256(path.read_bytes()).hexdigest())

    try:
        return opened(batch)
    except Alone:
        one, two = opened(1, alone=True), opened(2)
    if not _answers_alone(one, two):
        raise UsageError(
            f"'{path}' was exported for two pictures or more, and answers one otherwise than the first of two: give "
            "--batch 2 or more, or export it with one picture."
        )
    return one


def _answers_alone(one: ModelSource, two: ModelSource) -> bool:
    """Whether a picture by itself gets the answer that it gets as the first of two."""
    both = drawn(two.inputs, np.random.RandomState(0))
    first = [array[: pictures(spec.shape)] for array, spec in zip(both, one.inputs, strict=True)]
    for ours, theirs in zip(one.original(*first), two.original(*both), strict=True):
        if ours.shape != theirs[:1].shape:
            return False
        scale = max(float(np.abs(theirs).max()), 1e-30) if theirs.dtype.kind == "f" else 0.0
        if np.mean(np.isclose(ours, theirs[:1], rtol=0, atol=ALIKE * scale, equal_nan=True)) < MOSTLY:
            return False
    return True


def _is_training(program: torch.export.ExportedProgram) -> bool:
    """Does some operator (BatchNorm, dropout) behave as in training?"""
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            names = [argument.name for argument in node.target._schema.arguments]
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            if given.get("training") is True or given.get("train") is True:
                return True
    return False


def _open_onnx(path: Path, batch: int, size: Size | None) -> ModelSource:
    onnx = _import("onnx", f"'{path}' needs two more packages: pip install onnx onnxruntime.")
    _import("onnxruntime", f"'{path}' needs one more package: pip install onnxruntime.")
    if not path.is_file():
        raise UsageError(f"there is no file '{path}': check the path.")
    try:
        model = onnx.load(path)
        _check_onnx(model)
    except Exception as error:  # damaged protobuf, missing external data, invalid graph
        raise ModelError(f"'{path}' is not a valid ONNX model ({_brief(error)}): export it again.") from error
    digest = _digest_of_graph(model)  # before its shapes are fixed: the weights are the same at any
    for value in _inputs_of(model):
        if not value.type.tensor_type.HasField("shape"):
            raise ModelError(f"'{path}' leaves the dimensions of '{value.name}' open: export it with a fixed number.")
    dims = [value.type.tensor_type.shape.dim for value in _inputs_of(model)]
    # An open extent is 0, has a name, or is -1 by some converters.
    extents = [tuple(dim.dim_value if dim.dim_value > 0 else None for dim in each) for each in dims]
    typical = [TYPICAL[layout(each)] if len(each) == RANK else (1,) + (0,) * (len(each) - 1) for each in extents]
    for each, shape in zip(dims, _shapes(path, extents, typical, batch, size), strict=True):
        for dim, length in zip(each, shape, strict=True):
            dim.dim_value = length  # what was left open is fixed now
    del model.graph.value_info[:]
    return open_graph(model, str(path), weights_digest=f"sha256:{digest}")


def _check_onnx(model: Any) -> None:
    """What its own optimiser has written, onnxruntime knows better than ONNX's checker does."""
    import onnx

    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError:
        have_shapes = all(each.type.tensor_type.HasField("shape") for each in _inputs_of(model))
        with contextlib.suppress(Exception):  # then the checker was right, and says why
            if have_shapes and exact_session(model):
                return
        raise


def _inputs_of(model: Any) -> list[Any]:
    constants = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in constants]


def open_graph(model: Any, name: str = "graph", **fields: Any) -> ModelSource:
    """An ONNX model, all of whose inputs have fixed extents."""
    from onnx.helper import tensor_dtype_to_np_dtype

    types = {value.name: value.type.tensor_type for value in _inputs_of(model)}
    if not all(each.elem_type for each in types.values()):
        raise ModelError(f"'{name}' must take tensors and nothing else: export it so.")
    inputs = [
        (key, [dim.dim_value for dim in each.shape.dim], str(tensor_dtype_to_np_dtype(each.elem_type)))
        for key, each in types.items()
    ]
    digest = _digest_of_graph(model)
    return _of_file(name, inputs, **{"weights_digest": f"sha256:{digest}"} | fields, onnx=model, graph_digest=digest)


def _digest_of_graph(model: Any) -> str:
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _of_file(name: str, inputs: Sequence[tuple[str, Sequence[int], str]], **fields: Any) -> ModelSource:
    """A model that holds its own weights. An artifact remembers the file's name alone, wherever it was."""
    specs = tuple(TensorSpec(key if len(inputs) > 1 else "input", tuple(shape), dtype) for key, shape, dtype in inputs)
    for spec in specs:
        if spec.dtype not in INPUT_DTYPES:
            allowed = ", ".join(INPUT_DTYPES)
            raise ModelError(f"'{name}' takes {spec.dtype} as '{spec.name}': export it with tensors of {allowed}.")
    file, picture = Path(name).name, specs[_picture([spec.shape for spec in specs])]
    size = preprocessing = None
    if len(picture.shape) == RANK:
        height, width = _sides(picture.shape)
        size = picture.shape[height], picture.shape[width]
        if len(specs) == 1 and (picture.shape[layout(picture.shape).index("C")], picture.dtype) == (CHANNELS, FLOAT):
            preprocessing = _preprocessing(size, custom=_laid_out(picture.shape))
    common = {
        "name": name,
        "module": None,
        "inputs": specs,
        "recipe": _recipe(file, pictures(picture.shape), size, None, False),
        "weights": {"source": "file", "file": file},
        "graph_digest": None,
        "preprocessing": preprocessing or {},
    }
    return _foreign(**common | fields)


def _foreign(**fields: Any) -> ModelSource:
    """A source whose outputs are not known before it ran once; that also shows that it runs at all."""
    source = ModelSource(**fields, output_names=())
    try:
        outputs = source.tried(*source.zeros())
        if strange := [str(output.dtype) for output in outputs if str(output.dtype) not in OUTPUT_DTYPES]:
            raise ValueError(f"it answers with {strange[0]}")
    except Exception as error:  # a model fails in its own way
        shapes = " and ".join(shown(spec.shape) for spec in source.inputs)
        raise ModelError(f"'{source.name}' does not run on an input of {shapes}: {_brief(error)}.") from error
    names = tuple(f"output{i}" for i in range(len(outputs)))
    scores = len(outputs) == 1 and outputs[0].ndim == 2 and str(outputs[0].dtype) == FLOAT
    source = dataclasses.replace(source, output_names=("logits",) if scores else names)
    return dataclasses.replace(source, inputs=_with_bounds(source))


def _with_bounds(source: ModelSource) -> tuple[TensorSpec, ...]:
    """The inputs, whole numbers with the bound below which the model takes any: they may be places in a table."""
    for bound in BOUNDS:
        inputs = tuple(spec._replace(below=bound) if spec.dtype in INDICES else spec for spec in source.inputs)
        if inputs == source.inputs:
            return inputs
        with contextlib.suppress(Exception):  # of a place that is not there
            source.original(*(np.full(spec.shape, (spec.below or 1) - 1, spec.dtype) for spec in inputs))
            return inputs
    return inputs


def _one_input(shape: Sequence[int]) -> tuple[TensorSpec, ...]:
    return (TensorSpec("input", tuple(shape), FLOAT),)


def _laid_out(shape: Sequence[int]) -> dict[str, Any]:
    """What preprocessing says of the layout where it is not the usual."""
    return {"layout": layout(shape)} if layout(shape) != "NCHW" else {}


def _sides(extents: Sequence[int | None]) -> tuple[int, int]:
    """The axes of height and width."""
    order = layout(extents)
    return order.index("H"), order.index("W")


def _picture(shapes: Sequence[Sequence[Any]]) -> int:
    """Which input is the picture: the first of four dimensions, else the first that is no single number."""
    first = next((at for at, shape in enumerate(shapes) if shape), 0)
    return next((at for at, shape in enumerate(shapes) if len(shape) == RANK), first)


def _shapes(
    path: Path,
    inputs: Sequence[Sequence[int | None]],
    typical: Sequence[Sequence[int]],
    batch: int,
    size: Size | None,
) -> list[tuple[int, ...]]:
    """The input shapes of a file: what it fixes, what the user chose for the rest, what is typical where he did not."""
    if not inputs:
        raise ModelError(f"'{path}' takes no input, so it is no model.")
    picture = _picture(inputs)
    if size is not None and len(inputs[picture]) != RANK:
        raise UsageError(f"'{path}' takes no pictures (batch x channels x height x width): leave out the image size.")
    shapes = []
    for at, (fixed, usual) in enumerate(zip(inputs, typical, strict=True)):
        if fixed and fixed[0] not in (batch, None) and batch != 1:
            raise UsageError(
                f"'{path}' takes batches of {fixed[0]} only: leave out the batch, or export it from "
                "two pictures or more with an open one."
            )
        wanted = [batch, *usual[1:]]
        if at == picture and size is not None:
            height, width = _sides(fixed)
            if fixed[height] not in (size[0], None) or fixed[width] not in (size[1], None):
                only = f"{fixed[height]}x{fixed[width]}"
                raise UsageError(f"'{path}' takes pictures of {only} only: leave out the image size.")
            wanted[height], wanted[width] = size
        shape = tuple(length or other for length, other in zip(fixed, wanted, strict=False))
        if not all(shape):
            raise ModelError(
                f"'{path}' leaves extent {shape.index(0)} of input {at + 1} open: export it with a fixed one."
            )
        shapes.append(shape)
    return shapes


def _import(package: str, sentence: str) -> Any:
    try:
        return importlib.import_module(package)
    except Exception as error:  # timm fails in more ways than ImportError when its own needs are not met
        raise ModelError(sentence) from error


# Shared -------------------------------------------------------------


def _checked_size(given: int | Sequence[int]) -> Size:
    try:
        height, width = (given, given) if isinstance(given, int) else (int(v) for v in given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"image size {given} is not a size: give one number, or height and width.") from error
    if not (1 <= height <= LARGEST and 1 <= width <= LARGEST):
        raise UsageError(f"image size {_show((height, width))} is impossible: choose {SMALLEST} to {LARGEST}.")
    return height, width


def _show(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def with_labels(source: ModelSource, path: Path) -> ModelSource:
    """The names of the classes from a file: one a line, or a JSON list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        labels = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
        classes = source.original(*source.zeros())[0].shape[-1]
        if source.output_names != ("logits",) or _checked_labels(labels, classes) is None:
            raise ValueError(f"it has {len(labels)} names, and the model {classes} classes in {source.output_names[0]}")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"'{path}' does not name the model's classes: {_brief(error)}.") from error
    return dataclasses.replace(source, labels=tuple(labels))


def _recipe(
    name: str, batch: int, size: Sequence[int] | None, num_classes: int | None, features_only: bool
) -> dict[str, Any]:
    return {
        "model": name,
        "batch": batch,
        "image_size": None if size is None else list(size),
        "num_classes": num_classes,
        "features_only": features_only,
    }


def _code_digest(recipe: dict[str, Any], module: nn.Module) -> str | None:
    """A hash of the code that a module runs: its structure, and every file beside those that define its classes.

    What PyTorch defines is named by PyTorch's version.
    """
    total = hashlib.sha256(f"{json.dumps(recipe)}\0{module!r}\0".encode())
    homes = {type(layer).__module__ for layer in module.modules()}
    files = [getattr(sys.modules.get(home), "__file__", None) for home in homes if home.partition(".")[0] != "torch"]
    if None in files:
        return None
    for folder in sorted({Path(file).parent for file in files if file}):
        for file in sorted(folder.glob("*.py")):
            total.update(f"{file.name}\0".encode() + file.read_bytes())
    return total.hexdigest()


def _preprocessing(
    size: Sequence[int], checkpoint: Checkpoint | None = None, custom: dict[str, Any] | None = None
) -> dict[str, Any]:
    """ImageNet's customs, unless the model has its own or the checkpoint was trained with others."""
    usual = {"mode": "RGB", "resize": "bicubic", "crop": "center", "scale": 1 / 255, **IMAGENET}
    stated = {} if checkpoint is None else checkpoint.preprocessing
    return {**usual, **(stated or custom or {}), "image_size": list(size)}  # what is stated is all


def _checked_preprocessing(value: dict[str, Any]) -> dict[str, Any]:
    from saevit_tvm.runtime.preprocess import check

    if not isinstance(value, dict):
        raise ValueError("it is not an object")
    check(value)
    return value


def _checked_labels(value: list[str], num_classes: int) -> tuple[str, ...] | None:
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise ValueError("it is not a list of names")
    return tuple(value) if len(value) == num_classes else None


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
