"""Pictures in C are pictures in Python: the same pixels after resizing, the same floats, the same PNGs."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from saevit_tvm.runtime import preprocess
from saevit_tvm.sdk import c_source

HERE = Path(__file__).parent
C = HERE.parents[1] / "saevit_tvm" / "sdk" / "c"
SIZES = [(32, 32), (1, 1), (7, 3), (33, 31), (31, 32), (64, 48), (200, 20), (20, 333), (641, 479), (1000, 1)]


def noise(width: int, height: int, channels: int = 3) -> np.ndarray:
    return np.random.RandomState(width * 1000 + height).randint(0, 256, (height, width, channels), np.uint8)


def described(how: dict[str, Any]) -> str:
    """The generated description of a model that takes such pictures."""
    tensor = {"name": "input", "shape": [1, 3, *how["image_size"]], "dtype": "float32"}
    manifest = {
        "model": "none",
        "versions": {"saevit_tvm": "0"},
        "target": {"name": "none", "arch": "none", "features": [], "tvm": {"kind": "llvm"}},
        "weights_digest": "sha256:",
        "inputs": [tensor],
        "outputs": [{"name": "scores", "shape": [1, 2], "dtype": "float32"}],
        "labels": ['a "quoted" one', "ein ß??/"],
        "preprocessing": how,
    }
    return c_source.describe(manifest, bytes(32), needs_opencl=False)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, compiled: Callable[..., Path]) -> Any:
    """reader(preprocessing) -> a function from a picture to what C makes of it."""

    def make(how: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray]:
        folder = tmp_path_factory.mktemp("image")
        height, width = how["image_size"]
        model, source = folder / "model.c", C / "src"
        model.write_text(described(how))
        parts = [f"-I{C / 'include'}", f"-I{source}", HERE / "image.c", model, source / "image.c", source / "common.c"]
        program = compiled(folder / "image", ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", *parts])

        def read(pixels: np.ndarray) -> np.ndarray:
            command = [str(program), str(pixels.shape[1]), str(pixels.shape[0])]
            done = subprocess.run(command, input=pixels.tobytes(), capture_output=True)
            assert done.returncode == 0, done.stderr.decode()
            return np.frombuffer(done.stdout, np.float32).reshape(1, 3, height, width)

        return read

    return make


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("crop", ["center", "none"])
@pytest.mark.parametrize("share", [None, 0.9])
def test_every_way_of_resizing_agrees_with_python_to_the_last_bit(
    reader: Any, resize: str, crop: str, share: float | None
) -> None:
    how: dict[str, Any] = {
        "mode": "RGB",
        "image_size": [32, 32] if crop == "center" else [40, 24],
        "resize": resize,
        "crop": crop,
        "scale": 1 / 255,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    how |= {} if share is None else {"crop_pct": share}
    read = reader(how)
    for width, height in SIZES:
        pixels = noise(width, height)
        wanted, got = preprocess.to_array(Image.fromarray(pixels), how), read(pixels)
        if int(PIL.__version__.split(".")[0]) < 13:  # these work in another order on tall pictures
            np.testing.assert_allclose(got, wanted, atol=1.01 / 255 / 0.224, rtol=0)
        else:
            np.testing.assert_array_equal(got, wanted, f"{width}x{height}")


def test_channels_go_last_where_the_model_has_them_so(reader: Any) -> None:
    plain = {"mode": "RGB", "resize": "nearest", "crop": "none", "scale": 1 / 255, "mean": [0.1, 0.2, 0.3]}
    how = plain | {"image_size": [12, 20], "std": [1, 2, 3], "layout": "NHWC"}
    pixels = noise(20, 12)
    wanted = preprocess.to_array(Image.fromarray(pixels), how)
    assert wanted.shape == (1, 12, 20, 3)
    np.testing.assert_array_equal(reader(how)(pixels).reshape(wanted.shape), wanted)


@pytest.fixture(scope="module")
def png(tmp_path_factory: pytest.TempPathFactory, compiled: Callable[..., Path]) -> Callable[[bytes], Any]:
    """What the example's reader makes of a PNG: pixels, or the reason why not."""
    folder = tmp_path_factory.mktemp("png")
    main = folder / "main.c"
    main.write_text(
        '#include "png.h"\n#include <stdio.h>\n#include <stdlib.h>\n'
        "int main(void) { static uint8_t data[1 << 22]; png_image p;\n"
        "  const char *fault = png_read(data, fread(data, 1, sizeof data, stdin), &p);\n"
        "  if (fault) { fputs(fault, stderr); return 1; }\n"
        '  printf("%d %d\\n", p.width, p.height); fwrite(p.rgb, 3, (size_t)p.width * (size_t)p.height, stdout);\n'
        "  free(p.rgb); return 0; }\n"
    )
    parts = ["-fsanitize=address,undefined", f"-I{C / 'example'}", main, C / "example" / "png.c"]
    program = compiled(folder / "png", parts)

    def read(data: bytes) -> Any:
        done = subprocess.run([str(program)], input=data, capture_output=True)
        assert done.returncode in (0, 1) and b"Sanitizer" not in done.stderr, done.stderr.decode()
        if done.returncode:
            return done.stderr.decode()
        size, pixels = done.stdout.split(b"\n", 1)
        width, height = map(int, size.split())
        return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)

    return read


def encoded(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "LA", "RGBA"])
@pytest.mark.parametrize("level", [0, 1, 9])
def test_pngs_are_read_as_pillow_reads_them(png: Callable[[bytes], Any], mode: str, level: int) -> None:
    smooth = np.add.outer(np.arange(61) * 2, np.arange(83)).astype(np.uint8)
    image = Image.fromarray(np.stack([smooth, smooth.T[:61, :1] + smooth, noise(83, 61)[..., 0]], axis=-1))
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(np.where(smooth > 100, 255, 0).astype(np.uint8)))
    image = image.convert(mode)
    white = Image.new("RGBA", image.size, "white")
    wanted = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    np.testing.assert_array_equal(png(encoded(image, compress_level=level)), np.asarray(wanted))


def test_no_damage_to_a_png_does_harm(png: Callable[[bytes], Any]) -> None:
    data = encoded(Image.fromarray(noise(20, 20)))
    for length in range(0, len(data), 97):
        assert isinstance(png(data[:length]), str)
    random = np.random.RandomState(0)
    for _ in range(60):
        damaged = bytearray(data)
        for position in random.randint(8, len(data), 4):
            damaged[position] = random.randint(256)
        png(bytes(damaged))
    assert "not a PNG" in png(b"GIF89a")
    assert "8 bits" in png(encoded(Image.fromarray(noise(4, 4)[..., 0].astype(np.int32) * 200).convert("I;16")))
