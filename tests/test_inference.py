"""The copy of a model for inference: the same outputs, and nothing of the model is changed."""

from __future__ import annotations

import pytest
import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from effspinenet_lib import create_model
from effspinenet_lib.training.device import synchronise_norms
from effspinenet_lib.training.export import _decoded_batch, inference_copy


def trained(name: str, **options) -> nn.Module:
    """A model in float64 with statistics and gains as training leaves them."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, **options).double().train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return model


def norms(model: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm) for layer in model.modules())


@pytest.mark.parametrize(
    ("name", "task", "left"),
    [
        ("eff_spinenet_m0", "detection", "some"),  # heads have a norm a level
        ("eff_spinenet_m0", "classification", "none"),
        ("efficientdet_d0", "detection", "some"),
        ("mobile_spinenet_49xs", "detection", "some"),
    ],
)
def test_a_copy_gives_the_same_outputs_with_fewer_norms(name, task, left):
    model = trained(name, task=task)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    copied = inference_copy(model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert norms(copied) < norms(model)
    assert (norms(copied) == 0) == (left == "none")
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        expected, found = model.eval().network(images), copied.network(images)
    pairs = zip(expected[:2], found[:2], strict=True) if left == "some" else [(expected, found)]
    for first, second in pairs:
        torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "synchronise",
    [convert_sync_batchnorm, lambda model: synchronise_norms(model, torch.device("cpu"))],
    ids=["torch", "own"],
)
@pytest.mark.parametrize("name", ["eff_spinenet_m0", "efficientnet_b0_fpn"])
def test_copies_of_models_that_several_processes_trained(name, synchronise):
    model = trained(name).eval()
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        expected = model.network(images)[:2]
        found = inference_copy(synchronise(model)).network(images)[:2]
    for first, second in zip(expected, found, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-9)


def test_boxes_outside_the_image_are_detected_neither_here_nor_where_it_is_exported() -> None:
    """A box whose corner touches the image after clipping has no area, whatever its score."""
    model = create_model("eff_spinenet_m0", num_classes=3).eval()
    shift, images = model.box_head.last_conv.bias, torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        nn.init.constant_(model.class_head.last_conv.bias, 2.0)
        shift.zero_()
        assert len(model(images)[0]["scores"]) > 0
        assert (_decoded_batch(model, images)[1] > 0).any()
        shift[::4] = 100.0  # anchor widths to the right
        assert len(model(images)[0]["scores"]) == 0
        assert not _decoded_batch(model, images)[1].any()
