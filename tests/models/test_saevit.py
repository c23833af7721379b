"""The network: its published sizes, its definition proven against plain numpy, and that it trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from saevit_tvm import models
from saevit_tvm.models.saevit import CIFFN, SAA, VARIANTS
from saevit_tvm.models.weights import randomise
from saevit_tvm.support.errors import UsageError

# name: G multiply-accumulates at 224, M parameters, as published or stated
SIZES = {"saevit_micro": (0.041, 0.227), "saevit_xs": (0.78, 6.1), "saevit_s": (1.26, 10.3)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_size_is_the_published_one(name: str) -> None:
    gmacs, params = SIZES[name]
    described = models.describe(name)
    assert described["gmacs"] == pytest.approx(gmacs, rel=0.01)
    assert described["params"] / 1e6 == pytest.approx(params, rel=0.01)
    assert described["summary"]


def test_macs_counts_by_hand() -> None:
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ConvTranspose2d(8, 8, 2, 2, groups=8))
    assert models.macs(layers, 10) == 10 * 10 * 8 * 3 * 9 + 10 * 10 * 8 * 4


def test_names_are_the_registered_variants() -> None:
    assert models.names() == list(VARIANTS) == ["saevit_micro", "saevit_xs", "saevit_s"]


def test_unknown_name_shows_what_there_is_and_the_nearest() -> None:
    with pytest.raises(UsageError, match="saevit_micro, saevit_xs, saevit_s; did you mean 'saevit_xs'"):
        models.create("saevit_xss")


# The definition, proven ---------------------------------------------


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * weight + bias


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def naive_saa(x: np.ndarray, w: dict[str, np.ndarray], rate: int, width: int = 16) -> np.ndarray:
    """DESIGN's definition in loops, one picture (height, width, channels)."""
    h, v, c = x.shape
    y = layer_norm(x, w["norm.weight"], w["norm.bias"])
    rows, columns = -(-h // rate), -(-v // rate)
    tokens = np.zeros((rows, columns, c))
    if rate == 1:
        tokens = y
    else:
        ring = np.pad(y, ((1, 1), (1, 1), (0, 0)))
        kernel = w["saliency.weight"][0]
        saliency = np.array(
            [[(ring[i : i + 3, j : j + 3].transpose(2, 0, 1) * kernel).sum() for j in range(v)] for i in range(h)]
        )
        for i in range(rows):
            for j in range(columns):
                window = np.s_[i * rate : (i + 1) * rate, j * rate : (j + 1) * rate]
                share = softmax(saliency[window])
                tokens[i, j] = (share[..., None] * y[window]).sum((0, 1))
    flat = tokens.reshape(-1, c)
    q, k, value = np.split(flat @ w["qkv.weight"].T + w["qkv.bias"], 3, axis=1)
    mixed = np.zeros_like(flat)
    for start in range(0, c, width):
        head = np.s_[start : start + width]
        for n in range(len(flat)):
            mixed[n, head] = softmax(q[n, head] @ k[:, head].T / np.sqrt(width)) @ value[:, head]
    tokens = (mixed @ w["proj.weight"].T + w["proj.bias"]).reshape(rows, columns, c)
    if rate == 1:
        return tokens
    spread = np.zeros_like(x)
    for i in range(h):
        for j in range(v):
            kernel = w["recover.weight"][:, 0, i % rate, j % rate]
            spread[i, j] = tokens[i // rate, j // rate] * kernel + w["recover.bias"]
    return spread


@pytest.mark.parametrize(("rate", "height", "width"), [(1, 3, 4), (2, 4, 6), (4, 8, 8), (4, 7, 9), (8, 9, 17)])
def test_saa_is_what_the_design_says(rate: int, height: int, width: int) -> None:
    layer = SAA(32, rate).double().eval()
    randomise(layer, seed=rate)
    x = np.random.RandomState(1).standard_normal((2, 32, height, width))
    weights = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        ours = layer(torch.from_numpy(x)).numpy()
    for picture, answer in zip(x, ours, strict=True):
        expected = naive_saa(picture.transpose(1, 2, 0), weights, rate).transpose(2, 0, 1)
        np.testing.assert_allclose(answer, expected, atol=1e-12)
    assert np.abs(ours).max() > 0.1


def test_saa_sees_nothing_of_what_pads_a_border_window() -> None:
    layer = SAA(16, 4).eval()
    randomise(layer, seed=0)
    flat = torch.ones(1, 5, 7, 16)
    with torch.no_grad():
        tokens = layer.aggregate(flat, 2, 2)
    torch.testing.assert_close(tokens, torch.ones(1, 4, 16))


def test_ciffn_is_what_the_design_says() -> None:
    torch.manual_seed(0)
    layer = CIFFN(16).double().eval()
    for tensor in (*layer.parameters(), layer.norm.running_mean, layer.norm.running_var):
        tensor.data.uniform_(0.1, 0.9)
    x = torch.from_numpy(np.random.RandomState(1).standard_normal((1, 16, 5, 6)))
    with torch.no_grad():
        normal = layer.norm(x)
        z = F.gelu(
            layer.depthwise(
                torch.einsum("bchw,oc->bohw", normal, layer.expand.weight[..., 0, 0]) + layer.expand.bias[:, None, None]
            )
        )
        shared = F.gelu((z * layer.decompose.weight[0]).sum(1, keepdim=True) + layer.decompose.bias)
        z = (1 + layer.gain) * z - layer.gain * shared
        expected = torch.einsum("bchw,oc->bohw", z, layer.reduce.weight[..., 0, 0]) + layer.reduce.bias[:, None, None]
        torch.testing.assert_close(layer(x), expected)


def test_tokens_are_49_in_every_stage_at_224() -> None:
    seen = []
    model = models.create("saevit_micro").eval()
    for layer in model.modules():
        if isinstance(layer, SAA):
            layer.qkv.register_forward_hook(lambda _layer, _inputs, output: seen.append(output.shape[1]))
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    assert seen == [49, 49, 49, 49]


# Shapes -------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 64), (57, 91), (33, 130), (1, 1)])
def test_any_size_gives_logits_and_four_maps(height: int, width: int) -> None:
    x = torch.zeros(2, 3, height, width)
    with torch.no_grad():
        assert models.create("saevit_micro", num_classes=7).eval()(x).shape == (2, 7)
        maps = models.create("saevit_micro", features_only=True).eval()(x)
    strides = (4, 8, 16, 32)
    expected = [(2, c, -(-height // s), -(-width // s)) for c, s in zip((16, 32, 48, 64), strides, strict=True)]
    assert [tuple(m.shape) for m in maps] == expected


def test_features_are_those_of_the_classifier() -> None:
    whole, backbone = models.create("saevit_micro").eval(), models.create("saevit_micro", features_only=True).eval()
    randomise(whole, 0)
    assert not backbone.load_state_dict(whole.state_dict(), strict=False).missing_keys
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 3, 64, 64)).astype(np.float32))
    with torch.no_grad():
        last = backbone(x)[-1]
        torch.testing.assert_close(whole.head(whole.norm(last).mean((2, 3))), whole(x))


def test_gray_input() -> None:
    with torch.no_grad():
        assert models.create("saevit_micro", in_chans=1).eval()(torch.zeros(1, 1, 64, 64)).shape == (1, 1000)


@pytest.mark.slow
def test_exported_graph_has_no_padding_where_the_rates_divide() -> None:
    model = models.create("saevit_micro").eval()

    def operators(size: int) -> set[str]:
        program = torch.export.export(model, (torch.zeros(1, 3, size, size),), strict=False)
        return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}

    assert not any("pad" in name or "slice" in name for name in operators(64))
    assert any("pad" in name for name in operators(72))


# Training -----------------------------------------------------------


def test_drop_path_acts_in_training_only_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    model = models.create("saevit_micro", drop_path=0.5)
    drop = model.stages[3][-1].drop_path
    assert (model.stages[0][0].drop_path.rate, drop.rate) == (0.0, 0.5)
    x = torch.ones(2000, 1, 1, 1)
    assert set(drop(x).unique().tolist()) == {0.0, 2.0}
    assert drop(x).mean().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.slow
def test_learns_digits() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.from_numpy(digits.images[:320].astype(np.float32))[:, None] / 8 - 1
    x = F.interpolate(x, (32, 32)).expand(-1, 3, -1, -1)
    y = torch.from_numpy(digits.target[:320])
    model = models.create("saevit_micro", num_classes=10, drop_path=0.05).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _epoch in range(6):
        for chosen in torch.randperm(320).split(32):
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.25 * np.mean(losses[:5])


def test_every_weight_gets_a_gradient_after_one_step() -> None:
    torch.manual_seed(0)
    model = models.create("saevit_micro", num_classes=10).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _step in range(2):  # the gain starts at zero, which hides what is behind it for one step
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 3, 64, 64)), torch.arange(8)).backward()
        optimizer.step()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
