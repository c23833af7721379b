"""The PyTorch model behind an artifact, made again from what its manifest says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from saevit_tvm.support.errors import ModelError

if TYPE_CHECKING:
    from saevit_tvm.models.opening import ModelSource


def recreate(manifest: dict[str, Any], weights: str | None = None) -> ModelSource:
    """The model with exactly the artifact's weights, or a ModelError that says why it cannot be made."""
    made = manifest["weights"]
    if weights is None and made["source"] == "file":
        raise ModelError(
            f"its weights came from '{made['file']}', which is not part of the artifact: give the file with --weights."
        )
    recipe = manifest["recipe"]
    from saevit_tvm.models.opening import open_model

    source = open_model(
        recipe["model"],
        weights=weights or made.get("name"),
        batch=recipe["batch"],
        image_size=recipe["image_size"],
        num_classes=recipe["num_classes"],
        features_only=recipe["features_only"],
        seed=made.get("seed", 0),
        pretrained=weights is None and made["source"] == "pretrained",
        input_dtype=recipe.get("input", "float32"),
    )
    if source.weights_digest != manifest["weights_digest"]:
        origin = f"'{weights}' holds" if weights else "this PyTorch makes"
        raise ModelError(
            f"{origin} other weights than the artifact's ({source.weights_digest[:19]} against "
            f"{manifest['weights_digest'][:19]}): give the file it was built from with --weights."
        )
    return source


def oracle(source: ModelSource) -> str:
    """Who computes the reference."""
    return "pytorch" if source.onnx is None else "onnxruntime"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's last bits depend on its threads; on one thread the reference is the same every time.

    And its threads spin while they wait for each other: on a machine with other work that took twenty times as much.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
