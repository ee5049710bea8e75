"""The copy of a model for inference: the same outputs, and nothing of the model is changed."""

from __future__ import annotations

import pytest
import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from effspinenet_lib import create_model
from effspinenet_lib.training.device import synchronise_norms
from effspinenet_lib.training.export import inference_copy


def randomise_norms(model: nn.Module) -> None:
    """Statistics and gains as training leaves them: a fresh norm would fold to nothing."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)


def norms(model: nn.Module) -> int:
    return sum(type(layer) is nn.BatchNorm2d for layer in model.modules())


@pytest.mark.parametrize("name", ["eff_spinenet_m0", "efficientdet_d0", "mobile_spinenet_49xs"])
def test_copies_of_detectors_give_the_same_outputs(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3).double().eval()
    randomise_norms(model)
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    copied = inference_copy(model)
    with torch.no_grad():
        expected, found = model.network(images), copied.network(images)
    assert norms(copied) < norms(model)
    for first, second in zip(expected[:2], found[:2], strict=True):
        torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str
)
def test_the_copy_gives_the_same_outputs_in_every_number_format_and_layout(dtype, limit, layout):
    """In float32 and bfloat16 it takes convolutions of its own; 130 pixels give odd sides."""
    torch.manual_seed(0)
    model = create_model("eff_spinenet_m0", num_classes=3).eval()
    randomise_norms(model)
    images = torch.randn(2, 3, 130, 200).contiguous(memory_format=layout)
    copied = inference_copy(model).to(memory_format=layout).to(dtype)
    with torch.inference_mode():
        expected, found = model.network(images)[:2], copied.network(images.to(dtype))[:2]
    for first, second in zip(expected, found, strict=True):
        assert (second.float() - first).norm() / first.norm() < limit


def test_the_copy_gives_the_same_detections_under_autocast_as_the_model():
    torch.manual_seed(0)
    model = create_model("eff_spinenet_m0", num_classes=3).eval()
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, found = model.network(images)[0], inference_copy(model).network(images)[0]
    assert (found.float() - expected.float()).norm() / expected.float().norm() < 0.05


@pytest.mark.parametrize("name", ["eff_spinenet_m0", "efficientnet_b0_fpn"])
@pytest.mark.parametrize(
    "synchronise",
    [convert_sync_batchnorm, lambda model: synchronise_norms(model, torch.device("cpu"))],
    ids=["torch", "own"],
)
def test_copies_of_models_that_several_processes_trained(name, synchronise):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3).double().eval()
    randomise_norms(model)
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        expected = model.network(images)[:2]
        found = inference_copy(synchronise(model)).network(images)[:2]
    for first, second in zip(expected, found, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-9)


def test_every_norm_of_a_model_without_a_head_of_convolutions_is_folded():
    model = create_model("eff_spinenet_m0", task="classification", num_classes=3).double().eval()
    randomise_norms(model)
    copied = inference_copy(model)
    images = torch.randn(1, 3, 128, 128, dtype=torch.float64)
    assert norms(copied) == 0
    with torch.no_grad():
        torch.testing.assert_close(copied.network(images), model.network(images))


def test_the_model_itself_stays_as_it_was():
    model = create_model("eff_spinenet_m0", num_classes=3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inference_copy(model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
