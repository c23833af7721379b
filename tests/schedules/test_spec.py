"""The text of a spec is the key of its records: it may not change, or everybody's measurements are lost."""

from __future__ import annotations

import pytest

from schedules.kernels import declare, declared, key, tiled
from schedules.spec import Epilogue, KernelSpec, Tensor

CONV = KernelSpec.of(
    "conv",
    [Tensor("x", (1, 56, 56, 48), "float16", "NHWC"), Tensor("residual", (1, 28, 28, 96), "float16", "NHWC")],
    [Tensor("w", (3, 3, 48, 96)), Tensor("b", (96,))],
    [Tensor("out", (1, 28, 28, 96), "float16", "NHWC")],
    {"strides": (2, 2), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1},
    ["bias", "add residual", "relu"],
)
# Golden: written down once.
GOLDEN = {
    '{"op":"conv","inputs":{"x":"1x56x56x48 NHWC float16","residual":"1x28x28x96 NHWC float16"},'
    '"weights":{"w":"3x3x48x96","b":"96"},"outputs":{"out":"1x28x28x96 NHWC float16"},'
    '"attrs":{"padding":[1,1,1,1],"strides":[2,2]},"epilogue":["bias","add residual","relu"]}': CONV,
    '{"op":"softmax","inputs":{"x":"2x7x64 strides=896x128x1"},"outputs":{"out":"2x7x64"}}': KernelSpec.of(
        "softmax", [Tensor("x", (2, 7, 64), strides=(896, 128, 1))], [], [Tensor("out", (2, 7, 64))]
    ),
    '{"op":"saa","inputs":{"x":"1x48x8x8 NCHW"},"weights":{"ln_g":"48"},"outputs":{"out":"1x48x8x8 NCHW"},'
    '"attrs":{"eps":1e-05,"heads":3,"r":2,"scale":0.25}}': KernelSpec.of(
        "saa",
        [Tensor("x", (1, 48, 8, 8), layout="NCHW")],
        [Tensor("ln_g", (48,))],
        [Tensor("out", (1, 48, 8, 8), layout="NCHW")],
        {"heads": 3, "r": 2, "eps": 1e-5, "scale": 0.25},
    ),
    '{"op":"pool","inputs":{"x":"2x8x6x6 NCHW","gate":"2x8x1x1 NCHW"},"weights":{"s":"8"},'
    '"outputs":{"out":"2x8x3x3 NCHW"},"attrs":{"kernel":[2,2],"mode":"max","strides":[2,2]},'
    '"epilogue":["scale","leaky:0.01","multiply gate"]}': KernelSpec.of(
        "pool",
        [Tensor("x", (2, 8, 6, 6), layout="NCHW"), Tensor("gate", (2, 8, 1, 1), layout="NCHW")],
        [Tensor("s", (8,))],
        [Tensor("out", (2, 8, 3, 3), layout="NCHW")],
        {"mode": "max", "kernel": (2, 2), "strides": (2, 2)},
        ["scale", "leaky:0.01", "multiply gate"],
    ),
    '{"op":"sum","inputs":{"x":""},"outputs":{"out":""}}': KernelSpec.of(
        "sum", [Tensor("x", ())], [], [Tensor("out", ())]
    ),
}


@pytest.mark.parametrize("text", GOLDEN)
def test_the_text_of_a_spec_is_what_it_was(text: str) -> None:
    assert GOLDEN[text].text == text
    assert KernelSpec.parse(text) == GOLDEN[text]


def test_a_field_at_its_default_is_not_written() -> None:
    """So a new field changes no key that is there."""
    assert KernelSpec.of("conv", [], [], [], {"groups": 1, "strides": [1, 1]}).text == '{"op":"conv"}'
    assert KernelSpec.parse('{"op":"conv"}')["strides"] == (1, 1)


def test_what_is_declared_is_read_back() -> None:
    func = declare(CONV).with_attr("global_symbol", "main")
    assert declared(func) == CONV
    assert [str(param.name) for param in func.params] == ["x", "residual", "w", "b", "out"]


def test_a_kernel_is_known_by_its_spec_and_a_candidate_by_its_tiling() -> None:
    import tvm

    mod = tvm.IRModule({"main": declare(CONV).with_attr("global_symbol", "main")})
    one, other = (key(tiled(mod, {"rows": rows, "unroll": 4}).mod) for rows in (4, 6))
    assert key(mod) == CONV.text
    assert one == "0xf1d5bd99920e30c1" and one != other


def test_an_image_has_axes() -> None:
    assert CONV.x.axes("CHW") == (48, 56, 56)
    assert CONV.laid_out("NCHW").x.shape == (1, 48, 56, 56)
    assert CONV.laid_out("NCHW").laid_out("NHWC") == CONV


def test_neighbouring_additions_are_one() -> None:
    assert Epilogue(("bias", "add residual", "relu", "add other")).sums == (
        ("bias", "add residual"),
        ("relu",),
        ("add other",),
    )
    assert Epilogue(("bias", "multiply gate", "add residual")).operands == ("gate", "residual")
