"""The convolutions with gradients of their own against torch's, and what uses them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from effspinenet_lib.kernels import DepthwiseConv2d, PointwiseConv2d
from effspinenet_lib.models.layers import MBConv, SqueezeExcitation

# Maps smaller than their kernel, odd, even, and larger; the quick ways differ between them.
SIDES = [(1, 1), (2, 3), (4, 5), (7, 9), (8, 8), (12, 6)]
CHANNELS = 6


def images(height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    drawn = torch.randn(2, CHANNELS, height, width, dtype=dtype)
    return drawn.contiguous(memory_format=torch.channels_last)


def run(conv: nn.Conv2d, features: Tensor) -> dict[str, Tensor]:
    """Output and gradients of a convolution for a loss that weighs every output differently."""
    features = features.clone().requires_grad_()
    conv.zero_grad()
    result = conv(features)
    slopes = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
    (result * slopes).sum().backward()
    found = {"output": result, "features": features.grad}
    return {**found, **{name: value.grad for name, value in conv.named_parameters()}}


def plain(conv: nn.Conv2d) -> nn.Conv2d:
    """torch's own convolution with the same settings and weights."""
    twin = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        groups=conv.groups,
        bias=conv.bias is not None,
        dtype=conv.weight.dtype,
    )
    twin.load_state_dict(conv.state_dict())
    return twin


def depthwise(kernel: int, stride: int, dtype: torch.dtype = torch.float64) -> DepthwiseConv2d:
    return DepthwiseConv2d(
        CHANNELS, CHANNELS, kernel, stride, kernel // 2, groups=CHANNELS, bias=False, dtype=dtype
    )


@pytest.mark.parametrize("size", SIDES, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (7, 1), (3, 2), (5, 2)])
def test_depthwise_convolution_has_the_values_and_gradients_of_torchs(kernel, stride, size):
    conv, features = depthwise(kernel, stride), images(*size)
    for name, expected in run(plain(conv), features).items():
        torch.testing.assert_close(run(conv, features)[name], expected, msg=name)


@pytest.mark.parametrize("size", SIDES, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), [(5, 1), (3, 2), (5, 2)])
def test_depthwise_gradients_in_bfloat16_are_the_exact_ones_to_its_precision(kernel, stride, size):
    # integers from -2 to 2: products and sums are exact in float32, and only results are rounded
    conv = depthwise(kernel, stride, torch.bfloat16)
    with torch.no_grad():
        conv.weight.copy_(torch.randint(-2, 3, conv.weight.shape))
    features = torch.randint(-2, 3, (2, CHANNELS, *size)).to(torch.bfloat16)
    features = features.contiguous(memory_format=torch.channels_last)
    found, expected = run(conv, features), run(plain(conv).double(), features.double())
    for name, value in expected.items():
        difference = (found[name].double() - value).norm() / value.norm().clamp(min=1e-9)
        assert difference < 2**-7, name


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_stride_on_one_pixel_reads_no_memory_that_nobody_wrote(kernel):
    """Freed blocks of NaN of every size at hand would show in the gradient of the weights."""
    layer = DepthwiseConv2d(24, 24, kernel, 2, kernel // 2, groups=24, bias=False)
    for _ in range(20):
        features = torch.randn(4, 24, 1, 1).to(memory_format=torch.channels_last).requires_grad_()
        freed = [torch.full((24 * count,), math.nan) for count in (1, 4, 9, 18, 25, 36, 50, 100)]
        freed += [values.bfloat16() for values in freed]
        del freed
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            layer(features).float().sum().backward()
        middle = layer.weight.grad[:, 0, kernel // 2, kernel // 2]
        torch.testing.assert_close(middle, features.detach().sum((0, 2, 3)), rtol=0.02, atol=0.05)
        assert layer.weight.grad.count_nonzero() <= 24


def test_a_second_derivative_is_refused_rather_than_wrong():
    conv, features = depthwise(5, 1), images(8, 8).requires_grad_()
    (slope,) = torch.autograd.grad(conv(features).square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError):
        slope.sum().backward()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pointwise_convolution_has_the_values_and_gradients_of_torchs(bias, dtype):
    conv = PointwiseConv2d(CHANNELS, 10, 1, bias=bias, dtype=dtype)
    features = images(7, 9, dtype)
    for name, expected in run(plain(conv), features).items():
        torch.testing.assert_close(run(conv, features)[name], expected, msg=name)


@pytest.mark.parametrize("make", [lambda: depthwise(5, 1, torch.float32), PointwiseConv2d])
def test_results_stay_channels_last_in_training(make):
    conv = make() if make is not PointwiseConv2d else make(CHANNELS, 10, 1)
    features = images(8, 8, torch.float32).requires_grad_()
    result = conv(features)
    result.sum().backward()
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert features.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("make", [lambda: depthwise(5, 1, torch.float32), PointwiseConv2d])
def test_autocast_computes_in_bfloat16_and_gives_float32_gradients_to_the_weights(make):
    conv = make() if make is not PointwiseConv2d else make(CHANNELS, 10, 1)
    with torch.autocast("cpu", torch.bfloat16):
        result = conv(images(8, 8, torch.float32))
    result.float().sum().backward()
    assert result.dtype == torch.bfloat16
    assert conv.weight.grad.dtype == torch.float32


def test_a_block_learns_the_same_in_either_layout():
    """In the plain layout torch's own gradients are taken: the two ways check each other."""
    torch.manual_seed(0)
    block = MBConv(CHANNELS, CHANNELS, 5, 1, 2, 0.5, "swish", 0.0).double().train()
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        features = images(9, 7).contiguous(memory_format=layout)
        torch.manual_seed(1)
        features.copy_(torch.randn(features.shape, dtype=torch.float64))
        block.zero_grad()
        block(features).square().sum().backward()
        gradients.append([value.grad.clone() for value in block.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_squeeze_and_excitation_scales_by_the_gate_of_the_mean():
    layer, features = SqueezeExcitation(CHANNELS, 3, "swish").double(), images(5, 4)
    mean = features.mean((2, 3))
    hidden = nn.functional.silu(mean @ layer.reduce.weight.flatten(1).T + layer.reduce.bias)
    gate = torch.sigmoid(hidden @ layer.expand.weight.flatten(1).T + layer.expand.bias)
    torch.testing.assert_close(layer(features), features * gate[:, :, None, None])
