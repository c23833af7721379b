"""Pictures: every kind a camera or a drawing program writes, arrives as a viewer would show it."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from saevit_tvm.runtime.preprocess import check, load_image, read_image, to_array, to_frame
from saevit_tvm.support.errors import SaevitError, UsageError

PLAIN: dict[str, Any] = {
    "image_size": [8, 8],
    "mode": "RGB",
    "resize": "nearest",
    "crop": "none",
    "scale": 1 / 255,
    "mean": [0.0, 0.0, 0.0],
    "std": [1.0, 1.0, 1.0],
}
ORIENTATION = 0x0112


def gradient(height: int = 8, width: int = 8) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) * 3], axis=-1).astype(np.uint8)


def loaded(image: Image.Image, path: Path, **save: Any) -> np.ndarray:
    """Through a file and back, as pixels of 0 to 255, height x width x 3."""
    image.save(path, **save)
    size = [image.height, image.width]
    array = load_image(path, {**PLAIN, "image_size": size})
    return (array[0] * 255).round().transpose(1, 2, 0).astype(int)


def test_values_are_scaled_and_normalised(tmp_path: Path) -> None:
    pixels = gradient()
    Image.fromarray(pixels).save(tmp_path / "x.png")
    stated = {**PLAIN, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    array = load_image(tmp_path / "x.png", stated)
    expected = (pixels / 255 - stated["mean"]) / stated["std"]
    assert array.shape == (1, 3, 8, 8) and array.dtype == np.float32 and array.flags.c_contiguous
    np.testing.assert_allclose(array[0], expected.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize("size", [(300, 200), (57, 640), (224, 224), (31, 30)])
@pytest.mark.parametrize("crop", ["center", "none"])
def test_a_share_in_the_middle_is_what_timm_keeps(size: tuple[int, int], crop: str) -> None:
    """Its transforms: resize the shorter side (or, squashed, both) to the size by the share, then crop the middle."""
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8))
    image = image.resize(size, Image.Resampling.BICUBIC)
    how = {**PLAIN, "image_size": [48, 48], "resize": "bicubic", "crop": crop, "crop_pct": 0.875}
    enlarged = math.floor(48 / 0.875)
    shorter = min(size)
    resized = [int(enlarged * side / shorter) if crop == "center" else enlarged for side in size]
    left, top = (round((side - 48) / 2.0) for side in resized)
    wanted = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + 48, top + 48))
    assert np.abs(np.asarray(wanted, int) - to_frame(image, how)[0]).max() <= 1


def test_crop_takes_the_middle_and_none_takes_everything() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    image = Image.fromarray(pixels)
    centre = to_array(image, {**PLAIN, "image_size": [10, 10], "crop": "center"})
    assert (centre == 1).all()
    squeezed = to_array(image, {**PLAIN, "image_size": [10, 10]})
    assert 0.2 < squeezed.mean() < 0.5


@pytest.mark.parametrize("resize", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("crop", ["center", "none"])
def test_height_and_width_are_not_swapped(resize: str, crop: str) -> None:
    image = Image.fromarray(gradient(90, 40))
    stated = {**PLAIN, "image_size": [45, 20], "resize": resize, "crop": crop}
    array = to_array(image, stated)
    assert array.shape == (1, 3, 45, 20)
    assert np.diff(array[0, 0].mean(1)).min() > 0 and np.ptp(array[0, 0], axis=1).max() < 0.05  # red falls down


# Kinds of pictures --------------------------------------------------


def test_gray_bilevel_and_palette(tmp_path: Path) -> None:
    gray = Image.fromarray(gradient()[..., 0])
    expected = np.repeat(np.asarray(gray)[..., None], 3, axis=2)
    np.testing.assert_array_equal(loaded(gray, tmp_path / "l.png"), expected)
    np.testing.assert_array_equal(loaded(gray.convert("P"), tmp_path / "p.png"), expected)
    bilevel = gray.point(lambda value: 255 * (value > 100)).convert("1")
    np.testing.assert_array_equal(loaded(bilevel, tmp_path / "b.png"), np.where(expected > 100, 255, 0))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_parts_become_white(tmp_path: Path, mode: str) -> None:
    alpha = np.full((8, 8), 255, np.uint8)
    alpha[:4], alpha[4] = 0, 128
    image = Image.fromarray(np.dstack([np.full((8, 8, 3), 40, np.uint8), alpha]))
    if mode == "PA":
        image = image.quantize(4)  # a palette that holds transparency
    pixels = loaded(image if mode != "LA" else image.convert("LA"), tmp_path / "x.png")
    assert (pixels[:4] == 255).all() and (abs(pixels[5:] - 40) <= 1).all()
    assert abs(pixels[4].mean() - (255 * 127 + 40 * 128) / 255) < 3


def test_transparent_colour(tmp_path: Path) -> None:
    pixels = gradient()
    answer = loaded(Image.fromarray(pixels), tmp_path / "x.png", transparency=tuple(int(v) for v in pixels[2, 3]))
    expected = pixels.astype(int)
    expected[2, 3] = 255
    np.testing.assert_array_equal(answer, expected)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_reduced_not_cut_off(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    pixels = loaded(Image.fromarray(values), tmp_path / f"x.{suffix}")
    np.testing.assert_array_equal(pixels[..., 0], (values / 257).round())


def test_sixteen_bit_colour(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + struct.pack(">6H", 0, 32896, 65535, 257, 25700, 5140) for _ in range(2))
    header = struct.pack(">2I5B", 2, 2, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(png)
    pixels = np.asarray(read_image(tmp_path / "x.png"))
    assert pixels[0].tolist() == [[0, 128, 255], [1, 100, 20]]


def test_cmyk_jpeg(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (200, 30, 60)).convert("CMYK")
    pixels = loaded(image, tmp_path / "x.jpg", quality=100)
    assert abs(pixels - [200, 30, 60]).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_put_upright(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(gradient(16, 8))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "x.png")), np.asarray(upright))


@pytest.mark.parametrize("name", ["x.jpg", "x.webp", "x.bmp", "x.gif", "x.tiff", "x.ppm"])
def test_other_formats(tmp_path: Path, name: str) -> None:
    pixels = loaded(Image.new("RGB", (16, 16), (250, 10, 10)), tmp_path / name)
    assert abs(pixels - [250, 10, 10]).max() <= 8


# Pictures that are none ---------------------------------------------


def test_missing_picture(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(UsageError, match="there is no picture"):
            load_image(path, PLAIN)


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run\n", b"\x89PNG\r\n\x1a\n"])
def test_foreign_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(SaevitError, match="is not a readable picture"):
        load_image(tmp_path / "x.png", PLAIN)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_truncated_picture(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8)).save(buffer, kind)
    (tmp_path / "x").write_bytes(buffer.getvalue()[: buffer.tell() // 2])
    with pytest.raises(SaevitError, match="is not a readable picture"):
        load_image(tmp_path / "x", PLAIN)


def test_float_picture(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(SaevitError, match="floating point"):
        load_image(tmp_path / "x.tiff", PLAIN)


@pytest.mark.parametrize("side", [9_000, 10_000, 100_000])
def test_oversize_picture_is_refused_before_it_is_decoded(
    tmp_path: Path, side: int, recwarn: pytest.WarningsRecorder
) -> None:
    header = struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "x.png").write_bytes(png + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    with pytest.raises(SaevitError, match="more than 80 million pixels: make it smaller first"):
        load_image(tmp_path / "x.png", PLAIN)
    assert not recwarn.list


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]), data=st.data())
def test_any_damage_is_one_error_or_an_array(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    buffer = io.BytesIO()
    Image.fromarray(gradient()).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x").write_bytes(content)
    try:
        array = load_image(tmp_path / "x", PLAIN)
    except SaevitError as error:
        assert str(tmp_path / "x") in str(error)
    else:
        assert array.shape == (1, 3, 8, 8) and np.isfinite(array).all()


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "BGR"},
        {"resize": "lanczos"},
        {"crop": "left"},
        {"image_size": [8]},
        {"image_size": [0, 8]},
        {"image_size": [8, 100_000]},
        {"image_size": [8.5, 8]},
        {"mean": [0, 0]},
        {"std": [1, 0, 1]},
        {"std": [1, float("nan"), 1]},
        {"scale": "1"},
    ],
)
def test_a_description_that_cannot_be_followed(change: dict[str, Any]) -> None:
    check(PLAIN)
    with pytest.raises(ValueError, match=next(iter(change))):
        check({**PLAIN, **change})
