"""Eff-SpineNet against outputs of the authors' code.

`tests/golden/spinenetv2_*` were computed by tensorflow/tpu at commit 1021ed8
(models/official/detection, `spinenetv2.py` and its heads) under TensorFlow 1.15 on a CPU, for
weights and images that a rule makes: every variable's values follow from its name. Of the class
outputs of P3 and P4 every seventh channel is kept. The authors sum a block's inputs, so Equation 1
is off here; their order of channels after space-to-depth is put into this library's.
"""

from __future__ import annotations

import csv
import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from effspinenet_lib.models.layers import MBConv, Resample, SeparableConv, SpaceToDepth
from effspinenet_lib.models.retinanet import RetinaHead, RetinaNet
from effspinenet_lib.models.scale_permuted import EffSpineNet
from effspinenet_lib.models.specs import (
    EQUAL_BETAS,
    LEARNED_BETAS,
    SCALES,
    BackboneSpec,
    backbone_spec,
)

GOLDEN = Path(__file__).parent / "golden"
LEVELS = (3, 4, 5, 6, 7)
CLASSES = 90
CHANNEL_STEP = {3: 7, 4: 7}  # of the class outputs that are kept
# The authors' file scales the rounded dimensions; the paper's costs want them unrounded.
M0_DIMS = (8, 16, 8, 8, 40, 24, 48, 16, 48, 64, 40, 80, 56, 40, 16, 56, 56, 16)
MODELS = ("m0", "d0", "sp_efficientnet_b0")

Array = NDArray[np.float64]


def spec_of(name: str) -> BackboneSpec:
    if name == "sp_efficientnet_b0":
        return backbone_spec(EQUAL_BETAS)
    if name == "d0":
        return backbone_spec(LEARNED_BETAS)
    spec = backbone_spec(LEARNED_BETAS, SCALES["M0"])
    blocks = zip(spec.blocks, M0_DIMS, strict=True)
    return replace(spec, blocks=tuple(replace(block, feature_dim=dim) for block, dim in blocks))


def build(name: str) -> RetinaNet:
    backbone = EffSpineNet(spec_of(name), weighted_fusion=False, stochastic_depth=0.0)
    scale = SCALES["M0" if name == "m0" else "D0"]
    model = RetinaNet(backbone, CLASSES, scale.head_dim, scale.head_layers)
    fill(model, name)
    return model


# ---- the rules of the weights and the images


def variable(name: str, kind: str, shape: tuple[int, ...]) -> Array:
    seed = zlib.crc32(name.encode())
    drawn = 2 * np.random.default_rng(seed).random(shape) - 1
    if kind in ("conv_kernel", "pointwise_kernel"):
        drawn = drawn * 1.35 * np.sqrt(3 / np.prod(shape[:3]))
    elif kind == "depthwise_kernel":
        drawn = 0.5 * drawn
        drawn[shape[0] // 2, shape[1] // 2] += 1
    else:
        base, spread = {
            "bias": (0, 0.1),
            "gamma": (1, 0.2),
            "beta": (0, 0.2),
            "moving_mean": (0, 0.2),
            "moving_variance": (1, 0.3),
        }[kind]
        drawn = base + spread * drawn
    return drawn.astype(np.float32).astype(np.float64)


def images(count: int) -> Tensor:
    side = np.arange(128)
    b = np.arange(count)[:, None, None, None]
    i, j, c = side[:, None, None], side[:, None], np.arange(3)
    waves = np.sin(0.07 * (i + 1) * (c + 1) + 0.05 * j * (b + 1) + b)
    noise = 2 * np.random.default_rng(201011426).random((4, 128, 128, 3))[:count] - 1
    return torch.from_numpy(np.float32(0.5 * waves + 0.5 * noise)).permute(0, 3, 1, 2).contiguous()


# ---- the tensors in the order in which the authors' code makes its variables


def norm_tensors(norm: nn.Module, patched: bool = False) -> Iterator[tuple[Tensor, bool]]:
    for part in ("weight", "bias", "running_mean", "running_var"):
        yield getattr(norm, part), patched


def conv_norm_tensors(pair: nn.Module, patched: bool = False) -> Iterator[tuple[Tensor, bool]]:
    yield pair[0].weight, patched
    yield from norm_tensors(pair[1], patched and pair[0].groups > 1)


def mbconv_tensors(block: MBConv) -> Iterator[tuple[Tensor, bool]]:
    yield from conv_norm_tensors(block.expand)
    yield from conv_norm_tensors(block.depthwise)
    for conv in (block.excite.reduce, block.excite.expand):
        yield conv.weight, False
        yield conv.bias, False
    yield from conv_norm_tensors(block.project)


def resample_tensors(resample: Resample) -> Iterator[tuple[Tensor, bool]]:
    patched = any(isinstance(layer, SpaceToDepth) for layer in resample.layers)
    for layer in resample.layers:
        if isinstance(layer, nn.BatchNorm2d):
            yield from norm_tensors(layer, patched)
        elif isinstance(layer, nn.Sequential):
            yield from conv_norm_tensors(layer, patched)


def separable_tensors(conv: SeparableConv) -> Iterator[tuple[Tensor, bool]]:
    yield conv.depthwise.weight, False
    yield conv.pointwise.weight, False
    if conv.pointwise.bias is not None:
        yield conv.pointwise.bias, False


def head_tensors(head: RetinaHead, level: int) -> Iterator[tuple[Tensor, bool]]:
    for layer, conv in enumerate(head.convs):
        if level == 0:
            yield from separable_tensors(conv)
        yield from norm_tensors(head.norms[level * head.layers + layer])
    if level == 0:
        yield from separable_tensors(head.predict)


def tensors(model: RetinaNet) -> Iterator[tuple[Tensor, bool]]:
    """Each with whether its input channels come from space-to-depth."""
    backbone = model.backbone
    yield from conv_norm_tensors(backbone.stem)
    for block, group in zip(backbone.spec.blocks, backbone.groups, strict=True):
        if str(block.index) in backbone.fusions:
            for resample in backbone.fusions[str(block.index)].resample.values():
                yield from resample_tensors(resample)
        for layer in group:
            yield from mbconv_tensors(layer)
    for lateral in model.lateral:
        yield from conv_norm_tensors(lateral)
    for level in range(len(LEVELS)):
        yield from head_tensors(model.class_head, level)
        yield from head_tensors(model.box_head, level)


def to_tensor(value: Array, kind: str, patched: bool) -> Array:
    """A variable in this library's axes and order of channels."""
    if kind in ("conv_kernel", "pointwise_kernel"):
        value = value.transpose(3, 2, 0, 1)
    elif kind == "depthwise_kernel":
        value = value.transpose(2, 3, 0, 1)
    if patched:  # channels: patch * C + channel there, channel * 4 + patch here
        axis = 1 if kind == "conv_kernel" else 0
        value = np.moveaxis(value, axis, 0)
        value = value.reshape(4, -1, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)
        value = np.moveaxis(value, 0, axis)
    return np.ascontiguousarray(value)


def shape_there(tensor: Tensor, kind: str) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    if kind in ("conv_kernel", "pointwise_kernel"):
        return (shape[2], shape[3], shape[1], shape[0])
    return (shape[2], shape[3], shape[0], 1) if kind == "depthwise_kernel" else shape


def fill(model: RetinaNet, name: str) -> None:
    """Give a model the weights of the golden outputs; their sums tell that the rule is right."""
    with (GOLDEN / "spinenetv2_variables.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, (tensor, patched) in zip(rows, tensors(model), strict=True):
        value = variable(row["name"], row["kind"], shape_there(tensor, row["kind"]))
        assert value.sum() == pytest.approx(float(row[f"sum_{name}"]), abs=1e-5), row["name"]
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(to_tensor(value, row["kind"], patched)))


def outputs(model: RetinaNet, batch: Tensor) -> dict[str, Array]:
    """Blocks, endpoints and heads by level, NHWC as theirs."""
    found: dict[str, Array] = {}
    features = model.backbone(batch)
    for number, (level, lateral) in enumerate(zip(LEVELS, model.lateral, strict=True)):
        endpoint = lateral(features[level])
        parts = {
            "block": features[level],
            "endpoint": endpoint,
            "class": model.class_head(endpoint, number)[:, :: CHANNEL_STEP.get(level, 1)],
            "box": model.box_head(endpoint, number),
        }
        for part, value in parts.items():
            found[f"{part}_p{level}"] = value.detach().permute(0, 2, 3, 1).double().numpy()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_block_endpoint_and_head_gives_the_authors_numbers(name: str) -> None:
    model = build(name).eval()
    with torch.inference_mode():
        found = outputs(model, images(1))
    expected = np.load(GOLDEN / f"spinenetv2_{name}.npz")
    assert set(found) == set(expected)
    for part in expected:
        theirs = expected[part].astype(np.float64)
        error = np.linalg.norm(found[part] - theirs) / np.linalg.norm(theirs)
        assert error < 1e-5, part


def test_a_training_step_gives_the_authors_numbers() -> None:
    """Batch statistics, in float64; running means as theirs, running variances PyTorch's.

    The authors' synchronised norm keeps the biased variance of a batch, PyTorch's norms, like
    TensorFlow's fused one, the unbiased one: n / (n - 1) times as large.
    """
    model = build("m0").double().train()
    with torch.no_grad():
        found = outputs(model, images(4).double())
    golden = json.loads((GOLDEN / "spinenetv2_m0_training.json").read_text())
    for part, expected in golden["outputs"].items():
        ours = found[part]
        if part.startswith("class") and ours.shape != tuple(expected["shape"]):
            continue  # a part of its channels
        assert ours.shape == tuple(expected["shape"])
        flat = ours.ravel()
        for key, value in (("first8", flat[:8]), ("last8", flat[-8:])):
            np.testing.assert_allclose(value, expected[key], rtol=1e-6, atol=1e-8, err_msg=part)
        assert np.abs(flat).mean() == pytest.approx(expected["mean_abs"], rel=1e-8)
        assert flat.mean() == pytest.approx(expected["mean"], rel=1e-6)
    norms = {
        "spinenetv2/batch_normalization": (model.backbone.stem[1], 4 * 64 * 64),
        # the depthwise norm of block 11, at level 7
        "spinenetv2/sub_policy7/scale_permuted_block_9/batch_normalization_1": (
            model.backbone.groups[10][0].depthwise[1],
            4 * 1 * 1,
        ),
        "retinanet/class_net/class-0-7": (
            model.class_head.norms[4 * model.class_head.layers],
            4 * 1 * 1,
        ),
    }
    assert set(norms) == set(golden["norms"])
    for name, (norm, count) in norms.items():
        mean, variance = (
            golden["norms"][name]["moving_mean"],
            golden["norms"][name]["moving_variance"],
        )
        np.testing.assert_allclose(norm.running_mean, mean["after"], rtol=1e-6, err_msg=name)
        before, after = (np.array(variance[when]) for when in ("before", "after"))
        biased = (after - 0.99 * before) / 0.01
        expected = 0.99 * before + 0.01 * biased * count / (count - 1)
        np.testing.assert_allclose(norm.running_var, expected, rtol=1e-6, err_msg=name)
