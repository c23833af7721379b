"""Train the checkpoint that ships with the package: saevit_micro on scikit-learn's handwritten digits.

    python scripts/train_digits.py

A few minutes on a CPU. Writes saevit_tvm/models/checkpoints/digits.safetensors and a picture of a digit that was held
out of the training, examples/digit-7.png. The accuracy is that of the last epoch; the held-out digits choose nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from saevit_tvm import models
from saevit_tvm.models.weights import digest, save_state
from saevit_tvm.runtime.preprocess import load_image, to_array

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "saevit_tvm/models/checkpoints/digits.safetensors"
EXAMPLE = ROOT / "examples/digit-7.png"
MODEL = "saevit_micro"
PREPROCESSING = {
    "image_size": [64, 64],
    "mode": "RGB",
    "resize": "bilinear",
    "crop": "center",
    "scale": 1 / 255,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
SEED, EPOCHS, BATCH, RATE = 0, 40, 48, 3e-3


def pictures(sheets: np.ndarray) -> list[Image.Image]:
    """8 x 8 digits of 0 to 16, as gray pictures."""
    return [Image.fromarray((sheet * (255 / 16)).round().astype(np.uint8)) for sheet in sheets]


def inputs(images: list[Image.Image]) -> torch.Tensor:
    arrays = [to_array(image.convert("RGB"), PREPROCESSING) for image in images]
    return torch.from_numpy(np.concatenate(arrays))


def varied(x: torch.Tensor) -> torch.Tensor:
    """Each digit a little moved, turned, stretched, fainter, and in half of all cases dark on light."""
    count = x.shape[0]
    angle, shear = torch.empty(2, count).uniform_(-0.15, 0.15)
    zoom = torch.empty(2, count).uniform_(0.85, 1.15)
    shift = torch.empty(2, count).uniform_(-0.12, 0.12)
    affine = torch.stack(
        [
            torch.stack([zoom[0], shear - angle, shift[0]], dim=1),
            torch.stack([angle, zoom[1], shift[1]], dim=1),
        ],
        dim=1,
    )
    x = F.grid_sample(x, F.affine_grid(affine, list(x.shape), False), padding_mode="border", align_corners=False)
    x = (x + 1) * torch.empty(count, 1, 1, 1).uniform_(0.7, 1.0) - 1
    return x * (torch.randint(2, (count, 1, 1, 1)) * 2 - 1)


def train(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    model.train()
    for epoch in range(EPOCHS):
        losses = []
        for chosen in torch.randperm(len(x)).split(BATCH)[: len(x) // BATCH]:
            loss = F.cross_entropy(model(varied(x[chosen])), y[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {np.mean(losses):.4f}", flush=True)
    model.eval()


def draw_example(model: torch.nn.Module, sevens: np.ndarray) -> None:
    """The seven nearest to the average one, large enough to be seen."""
    distance = ((sevens - sevens.mean(0)) ** 2).sum((1, 2))
    seven = pictures(sevens[distance.argmin()][None])[0]
    EXAMPLE.parent.mkdir(parents=True, exist_ok=True)
    seven.resize((256, 256), Image.Resampling.BICUBIC).save(EXAMPLE, optimize=True)
    with torch.no_grad():
        answer = model(torch.from_numpy(load_image(EXAMPLE, PREPROCESSING))).softmax(1)[0]
    print(f"{EXAMPLE.relative_to(ROOT)} is taken for a {answer.argmax()} (probability {answer.max():.3f})")


def main() -> None:
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the same sums in the same order on every number of cores
    digits = load_digits()
    split = train_test_split(digits.images, digits.target, test_size=360, random_state=SEED, stratify=digits.target)
    train_images, test_images, train_labels, test_labels = split
    model = models.create(MODEL, num_classes=10, drop_path=0.05)
    train(model, inputs(pictures(train_images)), torch.from_numpy(train_labels))

    with torch.no_grad():
        right = (model(inputs(pictures(test_images))).argmax(1).numpy() == test_labels).sum()
    accuracy = right / len(test_labels)
    print(f"held-out accuracy {accuracy:.4f} ({right} of {len(test_labels)})")
    metadata = {
        "saevit.model": MODEL,
        "saevit.num_classes": "10",
        "saevit.image_size": json.dumps(PREPROCESSING["image_size"]),
        "saevit.labels": json.dumps([str(digit) for digit in range(10)]),
        "saevit.preprocessing": json.dumps(PREPROCESSING),
        "saevit.accuracy": f"{accuracy:.4f}",
    }
    CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
    save_state(model, CHECKPOINT, metadata)
    print(f"{CHECKPOINT.relative_to(ROOT)}: {CHECKPOINT.stat().st_size:,} bytes, weights {digest(model)}")

    draw_example(model, test_images[test_labels == 7])


if __name__ == "__main__":
    main()
