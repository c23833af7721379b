"""Weights in and out of a model: files, the digest that names them, and random ones that are worth comparing.

A weights file is data. Nothing in it is ever executed: `.pt` goes through PyTorch's weights-only reader.
"""

from __future__ import annotations

import copy
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from saevit_tvm.support.errors import ModelError, UsageError

CHECKPOINTS = Path(__file__).parent / "checkpoints"
SUFFIXES = (".safetensors", ".pt", ".pth")
WRAPPERS = ("state_dict", "model_state_dict", "model")  # what training scripts call the weights among other things
PREFIXES = ("module.", "_orig_mod.", "module.", "model.")
COUNTER = "num_batches_tracked"  # counts training steps; inference does not see it


def shipped() -> dict[str, Path]:
    """The checkpoints that come with the package, by name."""
    return {path.stem: path for path in sorted(CHECKPOINTS.glob("*.safetensors"))}


# Reading and writing ------------------------------------------------


def load_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a weights file, and the metadata of a `.safetensors`."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ModelError(f"'{path}' is not a weights file: give a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    if not path.is_file():
        raise UsageError(f"there is no weights file '{path}': check the path.")
    state, metadata = _load_safetensors(path) if path.suffix == ".safetensors" else (_load_pt(path), {})
    return _without_prefix(state), metadata


def save_state(module: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write a `.safetensors` of the module's weights, all of it or nothing."""
    from safetensors.torch import save

    state = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    content = save({name: tensor for name, tensor in state.items() if not name.endswith(COUNTER)}, metadata)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"'{path}' is not a readable .safetensors file ({_brief(error)}): fetch or save it again."
        ) from error


def _load_pt(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises almost anything
        raise ModelError(
            f"'{path}' is damaged, or holds more than weights (nothing in it was executed): "
            "save the model's state_dict() again, best as .safetensors."
        ) from error
    state = _inner(loaded)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise ModelError(f"'{path}' does not hold a state_dict: save one with torch.save(model.state_dict(), ...).")
    return dict(state)


def _inner(loaded: Any) -> Any:
    """The state of a checkpoint that holds more: an epoch, an optimiser, a second set of averaged weights."""
    wrapped = [loaded[key] for key in WRAPPERS if isinstance(loaded, dict) and isinstance(loaded.get(key), dict)]
    return wrapped[0] if wrapped else loaded


def _without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the model has them, where what trained it was wrapped around it: data parallel, compiled, trainers."""
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:120]


# Into the module ----------------------------------------------------


def apply_state(module: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Copy the tensors into the module if they are exactly its own and all finite, or touch nothing."""
    own = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith(COUNTER)}
    own = _without_prefix(own)  # a model may have itself what others are wrapped in
    state = {name: tensor for name, tensor in state.items() if not name.endswith(COUNTER)}
    if missing := sorted(own.keys() - state.keys()):
        raise ModelError(f"{origin} lacks {_some(missing)}: these are weights of another model.")
    if extra := sorted(state.keys() - own.keys()):
        raise ModelError(f"{origin} holds {_some(extra)}, which the model lacks: these are weights of another model.")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ModelError(
                f"{origin} holds '{name}' of shape {list(tensor.shape)} and the model has {list(own[name].shape)}: "
                "these are weights of another model, or for another number of classes."
            )
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized:
            raise ModelError(f"{origin} holds '{name}' in a form that is not plain numbers: save it as float32.")
    ready = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    if broken := sorted(name for name, tensor in ready.items() if not torch.isfinite(tensor).all()):
        raise ModelError(f"{origin} holds NaN or infinity in {_some(broken)}: train or export the weights again.")
    with torch.no_grad():
        for name, tensor in ready.items():
            own[name].copy_(tensor)


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"


def digest(module: nn.Module) -> str:
    """What names these weights: a hash of every tensor's name, dtype, shape and bytes, in no order."""
    return digest_tensors(dict(module.state_dict()))


def digest_tensors(state: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if not name.endswith(COUNTER):
            content = tensor.detach().cpu().contiguous()
            total.update(f"{name}\0{content.dtype}\0{list(content.shape)}\0".encode())
            total.update(content.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"sha256:{total.hexdigest()}"


# Random weights -----------------------------------------------------


AMPLIFIED = 1e-5


def randomise(module: nn.Module, seed: int, image_size: tuple[int, int] = (128, 128)) -> None:
    """Weights that a comparison can trust: all of them matter, and signals stay near 1 in any depth.

    The same seed gives the same bytes on every machine: the numbers are uniform (no logarithm involved), and
    the statistics of BatchNorm are measured in float64 and then rounded coarsely.
    """
    stream = np.random.RandomState(seed)
    with torch.no_grad():
        for layer in module.modules():
            for name, parameter in layer.named_parameters(recurse=False):
                centre, spread = _range(layer, name, parameter)
                values = centre + spread * stream.uniform(-1, 1, tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(np.asarray(values, dtype=np.float32)))
        if any(isinstance(layer, _BatchNorm) for layer in module.modules()):
            _measure_statistics(module, stream.uniform(-(3**0.5), 3**0.5, (4, 3, *image_size)))


def calm(module: nn.Module, image_size: tuple[int, int]) -> None:
    """Make random weights of a model that amplifies the last bit of its input smaller, until it does so no more.

    With such weights no two computations agree, be they both right; trained ones are never like that.
    """
    stream = np.random.RandomState(0)
    images, pictures = (
        stream.uniform(-(3**0.5), 3**0.5, (4, 3, *image_size)),
        stream.standard_normal((4, 3, *image_size)),  # some models do so for one and not for another
    )
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.affine]
    with torch.no_grad():
        while norms and _amplifies(module, torch.from_numpy(pictures)) and norms[0].weight.abs().max() > 2.0**-6:
            for norm in norms:
                norm.weight.mul_(0.5)
            _measure_statistics(module, images)


def _amplifies(module: nn.Module, images: Tensor) -> bool:
    """Does what is computed in float32 differ from what is computed in float64 by much more than its rounding?"""
    single, double = (tree_leaves(each) for each in (module(images.float()), copy.deepcopy(module).double()(images)))
    pairs = zip(single, double, strict=True)
    return any((a - b).abs().max() > AMPLIFIED * b.abs().max() for a, b in pairs)


def _range(layer: nn.Module, name: str, parameter: Tensor) -> tuple[float, float]:
    """Centre and half-width of the uniform distribution that a parameter is drawn from."""
    if name == "weight" and isinstance(layer, (_ConvNd, nn.Linear)):
        return 0.0, (3 / _fan_in(layer)) ** 0.5
    if name == "weight" and parameter.dim() == 1:  # the scale of a normalisation
        return 1.0, 0.5
    return 0.0, 0.5


def _fan_in(layer: nn.Module) -> float:
    """How many inputs each output adds up."""
    weight: Any = layer.weight
    if isinstance(layer, _ConvTransposeNd):
        return weight.shape[0] / layer.groups * weight[0, 0].numel() / np.prod(layer.stride)
    return weight[0].numel()


def _measure_statistics(module: nn.Module, images: np.ndarray) -> None:
    """Set every BatchNorm's mean and variance to about those of its input, in order of execution."""
    twin = copy.deepcopy(module).double().eval()
    pairs = dict(zip(twin.modules(), module.modules(), strict=True))

    def measure(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.running_var is not None:
            deviation, mean = torch.std_mean(inputs[0].transpose(0, 1).flatten(1), dim=1)
            scale = torch.exp2(deviation.clamp(min=2.0**-10).log2().round())
            layer.running_var.copy_(scale**2)
            layer.running_mean.copy_((4 * mean / scale).round() * scale / 4)
            pairs[layer].load_state_dict(layer.state_dict())

    for layer in twin.modules():
        layer.register_forward_pre_hook(measure)
    with torch.no_grad():
        twin(torch.from_numpy(images))
