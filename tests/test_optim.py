"""The optimizers, the exponential schedule and the average of the weights, written out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from effspinenet_lib.models.zoo import create_model
from effspinenet_lib.training.optim import (
    build_ema,
    build_optimizer,
    decayed_parameters,
    learning_rate_at,
    load_optimizer,
    set_learning_rate,
)
from effspinenet_lib.training.recipes import get_recipe

IMAGENET = get_recipe("paper_classification")


def test_norms_biases_and_fusion_weights_are_not_decayed() -> None:
    model = create_model("eff_spinenet_m0", num_classes=3)
    decayed, kept = decayed_parameters(model, get_recipe("paper_detection"))
    kernels = {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    }
    assert set(decayed) == kernels
    assert set(decayed) | set(kept) == {name for name, _ in model.named_parameters()}
    assert any("fusion" in name for name in kept)
    everything, nothing = decayed_parameters(
        model, get_recipe("paper_detection").replace(decay_norms_and_biases=True)
    )
    assert len(everything) == len(decayed) + len(kept)
    assert nothing == []


def test_the_exponential_schedule_falls_in_steps_after_a_warmup_to_the_full_rate() -> None:
    peak, every, warmup = 0.128, 1_501, 3_127
    assert learning_rate_at(IMAGENET, 0) == 0
    assert learning_rate_at(IMAGENET, warmup - 1) == pytest.approx(peak * (1 - 1 / warmup))
    for falls in (3, 10, 145):
        step = falls * every
        assert learning_rate_at(IMAGENET, step) == pytest.approx(peak * 0.97**falls)
        assert learning_rate_at(IMAGENET, step - 1) == pytest.approx(peak * 0.97 ** (falls - 1))
    assert learning_rate_at(IMAGENET, warmup) == pytest.approx(peak * 0.97**2)


def test_rmsprop_is_tensorflows() -> None:
    """The update rule of tf.train.RMSPropOptimizer, with L2 added to the gradient first."""
    layer = nn.Linear(3, 1).double()
    recipe = IMAGENET.replace(weight_decay=0.1)
    optimizer = build_optimizer(layer, recipe)
    weights, bias = layer.weight.tolist()[0], layer.bias.item()
    squares, momenta = [1.0] * 4, [0.0] * 4
    generator = torch.Generator().manual_seed(0)
    for rate in (0.5, 0.25, 0.25, 0.125):
        gradient = torch.randn(4, generator=generator, dtype=torch.float64)
        layer.weight.grad, layer.bias.grad = gradient[None, :3].clone(), gradient[3:].clone()
        set_learning_rate(optimizer, rate)
        optimizer.step()
        values = [*weights, bias]
        for place, plain in enumerate(gradient.tolist()):
            decay = 0.1 * values[place] if place < 3 else 0.0
            slope = plain + decay
            squares[place] = 0.9 * squares[place] + 0.1 * slope**2
            momenta[place] = 0.9 * momenta[place] + rate * slope / math.sqrt(squares[place] + 1e-3)
            values[place] -= momenta[place]
        *weights, bias = values
    assert layer.weight.tolist()[0] == pytest.approx(weights, rel=1e-12)
    assert layer.bias.item() == pytest.approx(bias, rel=1e-12)


def test_an_optimizer_goes_on_from_its_state() -> None:
    def steps(layer: nn.Linear, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            layer(torch.ones(1, 2)).square().sum().backward()
            optimizer.step()

    whole = nn.Linear(2, 2)
    parts = copy.deepcopy(whole)
    steps(whole, build_optimizer(whole, IMAGENET.replace(warmup_steps=0)), 4)
    first = build_optimizer(parts, IMAGENET.replace(warmup_steps=0))
    steps(parts, first, 2)
    second = build_optimizer(parts, IMAGENET.replace(warmup_steps=0))
    second.load_state_dict(first.state_dict())
    steps(parts, second, 2)
    assert torch.equal(whole.weight, parts.weight)


def test_no_average_unless_the_recipe_asks_for_one() -> None:
    assert build_ema(nn.Linear(1, 1), get_recipe("paper_detection")) is None


@pytest.mark.parametrize("decay", [0.25, 0.9999])
def test_the_average_of_weights_and_statistics_is_tensorflows(decay: float) -> None:
    """After n steps the old average keeps min(decay, (1 + n) / (10 + n))."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = build_ema(model, IMAGENET.replace(ema_decay=decay))
    assert ema is not None
    names = ("0.weight", "1.running_mean", "1.running_var", "1.weight")
    expected = {name: model.state_dict()[name].double() for name in names}
    for step in range(1, 7):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += step
        model(torch.randn(4, 2, generator=torch.Generator().manual_seed(step)))
        ema.update(model, step)
        kept = min(decay, (1 + step) / (10 + step))
        for name in names:
            new = model.state_dict()[name].double()
            expected[name] = kept * expected[name] + (1 - kept) * new
    for name in names:
        torch.testing.assert_close(ema.module.state_dict()[name].double(), expected[name])
    assert ema.module.state_dict()["1.num_batches_tracked"] == 6
    assert not ema.module.training


def test_an_average_goes_on_from_its_state() -> None:
    model = nn.Linear(2, 2)
    first = build_ema(model, IMAGENET)
    assert first is not None
    with torch.no_grad():
        model.weight.add_(1)
    first.update(model, 1)
    second = build_ema(model, IMAGENET)
    assert second is not None
    second.module.load_state_dict(copy.deepcopy(first.module.state_dict()))
    for average in (first, second):
        average.update(model, 2)
    assert torch.equal(first.module.weight, second.module.weight)


@pytest.mark.parametrize("saved", [{"fused": True}, {"foreach": True}])
def test_a_loaded_optimizer_updates_as_this_device_does(saved):
    model = nn.Linear(3, 2)
    before = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **saved)
    model(torch.ones(1, 3)).sum().backward()
    before.step()
    after = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, fused=False)
    load_optimizer(after, copy.deepcopy(before.state_dict()))
    (group,) = after.param_groups
    assert (group["fused"], group["foreach"], group["lr"]) == (False, None, 0.1)
    momentum = after.state[model.weight]["momentum_buffer"]
    assert torch.equal(momentum, before.state[model.weight]["momentum_buffer"])


def test_adamw_decays_kernels_decoupled_from_the_gradient() -> None:
    """Loshchilov and Hutter's rule after one step, where both moments equal the gradient's."""
    layer = nn.Linear(3, 1).double()
    rate, decay = 0.1, 0.3
    recipe = get_recipe("small_data_detection").replace(
        optimizer="adamw",
        optimizer_decay=0.99,
        optimizer_epsilon=1e-8,
        weight_decay=decay,
        learning_rate=rate,
        warmup_steps=0,
    )
    optimizer = build_optimizer(layer, recipe)
    weights, bias = layer.weight.detach().clone(), layer.bias.item()
    inputs = torch.tensor([[2.0, -1.0, 0.5]]).double()
    layer(inputs).sum().backward()
    optimizer.step()
    expected = weights * (1 - rate * decay) - rate * inputs.sign()
    assert torch.allclose(layer.weight, expected, atol=1e-6)
    assert layer.bias.item() == pytest.approx(bias - rate, abs=1e-6)
