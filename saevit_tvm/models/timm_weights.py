"""The trained weights that timm names for a model: from a cache of this machine if they are there, else fetched.

timm would find them by itself, but without a network it tries for minutes before it looks into the cache.
"""

from __future__ import annotations

import contextlib
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from saevit_tvm.support.errors import ModelError, UsageError

PATIENCE = 10  # seconds for a host to answer at all


@dataclass(frozen=True)
class Trained:
    """Where weights come from, for how many classes they are, and what timm is told to take them."""

    origin: str
    num_classes: int
    options: dict[str, Any]

    def labels(self) -> tuple[str, ...] | None:
        """The names of ImageNet's classes, where there are as many as in one of its kinds."""
        from timm.data import ImageNetInfo, infer_imagenet_subset

        subset = infer_imagenet_subset({"num_classes": self.num_classes})
        return tuple(ImageNetInfo(subset).label_descriptions()) if subset else None


def fetch(name: str, num_classes: int | None) -> Trained:
    """The weights of a model of timm's, with a tag as in resnet18.a1_in1k or without."""
    from timm.models import get_pretrained_cfg

    try:
        config = get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UsageError(f"timm has no weights '{name}' ({_brief(error)}): see timm.list_pretrained().") from error
    if config is None or not config.has_weights:
        raise UsageError(f"timm has no trained weights for '{name}': leave out --pretrained, or give --weights FILE.")
    if num_classes not in (None, config.num_classes):
        known = f"the trained weights of '{name}' know {config.num_classes} classes, not {num_classes}"
        raise UsageError(f"{known}: leave out --classes.")
    origin = str(config.hf_hub_id or config.url)
    try:
        overlay = _on_the_hub(config.hf_hub_id) if config.hf_hub_id else _at_a_url(str(config.url))
    except Exception as error:  # there are many ways not to reach a file
        raise ModelError(
            f"the trained weights of '{name}' cannot be fetched from {origin} ({_brief(error)}): connect this machine, "
            "fill the cache that HF_HUB_CACHE names, or give --weights FILE."
        ) from error
    return Trained(origin, config.num_classes, {"pretrained": True, "pretrained_cfg_overlay": overlay})


def _on_the_hub(identifier: str) -> dict[str, Any]:
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError("a package is not installed, pip install huggingface_hub") from error

    repository, _, revision = identifier.partition("@")

    def download(file: str, **options: Any) -> dict[str, Any]:
        path = huggingface_hub.hf_hub_download(repository, file, revision=revision or None, **options)
        return {"file": path, "custom_load": False}

    files = ("model.safetensors", "pytorch_model.bin")  # in timm's order
    for file in files:
        with contextlib.suppress(LocalEntryNotFoundError):
            return download(file, local_files_only=True)
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        _reach(huggingface_hub.constants.ENDPOINT)
    try:
        return download(files[0])
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):  # no network, which says nothing of the file
            raise
        return download(files[1])


def _at_a_url(url: str) -> dict[str, Any]:
    """timm fetches them itself, if it can."""
    import torch

    if not Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name).exists():
        _reach(url)
    return {}


def _reach(url: str) -> None:
    """Raise OSError soon where a host cannot be reached."""
    with contextlib.suppress(urllib.error.HTTPError):  # an answer, too
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]
