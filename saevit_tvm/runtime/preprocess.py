"""From a picture to what a model expects, just as a manifest's `preprocessing` states it. Only Pillow and numpy.

Pictures are taken as a viewer shows them: turned upright, transparent parts on white, 16 bits reduced to 8.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from saevit_tvm.support.errors import SaevitError, UsageError

# Not every format that Pillow knows: some start other programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
RESIZE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
CROP = ("center", "none")
LAYOUTS = ("NCHW", "NHWC")
LARGEST_SIDE = 4096
SMALLEST_SHARE = 0.1  # of a side that is kept
MOST_PIXELS = 80_000_000


def load_image(path: str | os.PathLike[str], preprocessing: Mapping[str, Any], dtype: str = "float32") -> np.ndarray:
    """A picture file as the model's float32, or as a frame: uint8 of shape (1, height, width, 3)."""
    check(preprocessing)
    frame = to_frame(read_image(Path(path)), preprocessing)
    return frame if dtype == "uint8" else normalised(frame, preprocessing)


def read_image(path: Path) -> Image.Image:
    """A picture file as an upright RGB picture."""
    if not path.is_file():
        raise UsageError(f"there is no picture '{path}': check the path.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _read(path)
    except SaevitError:
        raise
    except Image.DecompressionBombError as error:
        most = f"{MOST_PIXELS // 1_000_000} million pixels"
        raise SaevitError(f"'{path}' has more than {most}: make it smaller first.") from error
    except Exception as error:  # decoders of damaged files raise almost anything
        reason = _reason(error)
        raise SaevitError(f"'{path}' is not a readable picture ({reason}): give a PNG or JPEG.") from error


def _read(path: Path) -> Image.Image:
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        return _as_rgb(ImageOps.exif_transpose(image), path)


def to_array(image: Image.Image, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """An RGB picture, resized, cropped and normalised."""
    return normalised(to_frame(image, preprocessing), preprocessing)


def to_frame(image: Image.Image, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """An RGB picture, resized and cropped."""
    height, width = preprocessing["image_size"]
    method = RESIZE[preprocessing["resize"]]
    if "crop_pct" in preprocessing:
        image = image.resize((width, height), method, box=_middle(image.width, image.height, preprocessing))
    elif preprocessing["crop"] == "center":
        image = ImageOps.fit(image, (width, height), method)
    else:
        image = image.resize((width, height), method)
    return np.asarray(image)[np.newaxis]


def enlarged(preprocessing: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of which the model's size is the middle: a share of `crop_pct` each way."""
    height, width = preprocessing["image_size"]
    return math.floor(height / preprocessing["crop_pct"]), math.floor(width / preprocessing["crop_pct"])


def _middle(width: int, height: int, preprocessing: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """What a picture keeps if it is resized as timm does it, its shorter side to the enlarged size, and then cropped.

    To resize this part alone reads the same pixels, and a long strip does not become a huge picture.
    """
    tall, wide = enlarged(preprocessing)
    if preprocessing["crop"] == "center":
        is_wider = width * tall >= height * wide
        wide, tall = (width * tall // height, tall) if is_wider else (wide, height * wide // width)
    sides = zip((width, height), (wide, tall), reversed(preprocessing["image_size"]), strict=True)
    (left, right), (top, bottom) = (_kept(*each) for each in sides)
    return left, top, right, bottom


def _kept(source: int, resized: int, size: int) -> tuple[float, float]:
    """Where the middle of a resized side begins and ends in the side as it was."""
    first = round((resized - size) / 2)
    return first * source / resized, (first + size) * source / resized


def normalised(frames: np.ndarray, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """Frames as the model was trained on them: numbers around zero, and mostly channels first."""
    pixels = frames.astype(np.float32) * np.float32(preprocessing["scale"])
    pixels = (pixels - np.float32(preprocessing["mean"])) / np.float32(preprocessing["std"])
    return pixels if channels_last(preprocessing) else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def channels_last(preprocessing: Mapping[str, Any]) -> bool:
    """Whether the model takes pictures as frames lie."""
    return preprocessing.get("layout") == "NHWC"


def check(preprocessing: Mapping[str, Any]) -> None:
    """Raise ValueError that names what in a description of preprocessing cannot be followed."""
    choices = {"mode": ("RGB",), "resize": tuple(RESIZE), "crop": CROP}
    if "layout" in preprocessing:
        choices["layout"] = LAYOUTS
    for key, allowed in choices.items():
        if preprocessing[key] not in allowed:
            raise ValueError(f"'{key}' is {preprocessing[key]!r} and can be one of {', '.join(allowed)}")
    size = preprocessing["image_size"]
    if len(size) != 2 or not all(isinstance(side, int) and 1 <= side <= LARGEST_SIDE for side in size):
        raise ValueError(f"'image_size' is {size!r} and must be [height, width], up to {LARGEST_SIDE}")
    values = [preprocessing["scale"], *preprocessing["mean"], *preprocessing["std"]]
    if len(values) != 7 or len(preprocessing["mean"]) != 3 or not all(_is_number(value) for value in values):
        raise ValueError("'scale' must be a number, 'mean' and 'std' three numbers each")
    share = preprocessing.get("crop_pct", 1)
    if not _is_number(share) or not SMALLEST_SHARE <= share <= 1:
        raise ValueError(f"'crop_pct' is {share!r} and must be {SMALLEST_SHARE} to 1")
    if 0 in preprocessing["std"]:
        raise ValueError("'std' holds a zero")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _as_rgb(image: Image.Image, path: Path) -> Image.Image:
    if image.mode == "F":
        raise SaevitError(f"'{path}' holds floating point values of unknown range: save it as an 8-bit PNG.")
    if image.mode.startswith("I"):  # a plain conversion would cut everything above 255 off
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no known format"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:120]
