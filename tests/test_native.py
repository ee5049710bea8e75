"""The compiled functions against torch's and torchvision's, and what happens without a compiler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torchvision.ops import sigmoid_focal_loss

from benchmarks.plain import make_plain
from effspinenet_lib import create_model
from effspinenet_lib.errors import Preempted
from effspinenet_lib.models.focal import focal_loss_sum
from effspinenet_lib.models.layers import conv_norm
from effspinenet_lib.native import functions, library, norm_activation, scale_channels

# Channels that fill vectors, and that leave some of their lanes; maps of one pixel to several
# blocks of what is summed at once.
SHAPES = [
    (2, 1, 1, 1),
    (2, 3, 5, 7),
    (1, 16, 4, 4),
    (3, 17, 9, 2),
    (2, 24, 33, 17),
    (2, 130, 40, 8),
]
DTYPES = [torch.float32, torch.bfloat16]
# Of the largest value: one rounding of the result's format, and what sums add.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
MOMENTUM, EPSILON = 0.01, 1e-3
THREADS = 3
SEVERAL_THREADS = (1, 24, 256, 200)  # numbers enough for each to get a share


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Skip where there is no compiler; the names of the compiled functions that are called."""
    if not library._compiler():
        pytest.skip("there is no C++ compiler here")
    assert library.load_library() is not None
    called, run = [], functions.run
    monkeypatch.setattr(functions, "run", lambda *given: (called.append(given[0]), run(*given)))
    return called


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """Let the library be looked for anew, in this test and after it."""
    library.load_library.cache_clear()
    yield
    library.load_library.cache_clear()


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    values = (3 * torch.randn(shape) + 5).to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


def make_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, EPSILON, MOMENTUM)
    nn.init.uniform_(norm.weight, -1, 2)
    nn.init.normal_(norm.bias)
    return norm


def exact_copy(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    twin = nn.BatchNorm2d(norm.num_features, EPSILON, MOMENTUM).double()
    twin.load_state_dict(norm.state_dict())
    return twin


def results(
    norm: nn.BatchNorm2d, activation: nn.Module | None, features: Tensor, slopes: Tensor
) -> dict[str, Tensor]:
    """Output, gradients and statistics; in float64 these are torch's own."""
    features = features.clone(memory_format=torch.preserve_format).requires_grad_()
    norm.zero_grad()
    output = norm_activation(norm, activation, features)
    output.backward(slopes.to(output.dtype))
    gradients = {name: value.grad for name, value in norm.named_parameters()}
    return {
        "output": output.detach(),
        "features": features.grad,
        **gradients,
        **dict(norm.named_buffers()),
    }


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, value in wanted.items():
        scale = value.abs().max().item()
        assert found[name].shape == value.shape
        difference = (found[name].double() - value.double()).abs().max().item()
        assert difference <= tolerance * scale + 1e-12, (name, difference, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, nn.SiLU()], ids=["norm", "swish"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_swish_have_the_values_gradients_and_statistics_of_torchs(
    shape, activation, dtype, compiled
):
    torch.manual_seed(0)
    features, slopes, norm = drawn(shape, dtype), torch.randn(shape), make_norm(shape[1])
    slopes = slopes.to(dtype)
    exact = exact_copy(norm)
    found = results(norm, activation, features, slopes)
    wanted = results(exact, activation, features.double(), slopes.double())
    ending = functions.NAMES[dtype] + ("_swish" if activation else "")
    assert compiled == [f"forward_{ending}", f"backward_{ending}"]
    assert found["output"].dtype == found["features"].dtype == dtype
    if shape[1:] == (1, 1, 1):  # of two numbers the gradient is a difference of equal numbers
        torch.testing.assert_close(found["features"].double(), wanted["features"], rtol=0, atol=0.1)
        found["features"] = wanted["features"]
    assert_near(found, wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("activation", [None, nn.SiLU()], ids=["norm", "swish"])
def test_several_threads_compute_what_one_does(activation, compiled):
    torch.manual_seed(0)
    features, slopes = drawn(SEVERAL_THREADS), torch.randn(SEVERAL_THREADS)
    norm = make_norm(SEVERAL_THREADS[1])
    exact = results(exact_copy(norm), activation, features.double(), slopes.double())
    with threads(THREADS):
        assert_near(results(norm, activation, features, slopes), exact, 1e-5)
    assert len(compiled) == 2


def test_a_mean_far_from_zero_costs_no_more_digits_than_torchs_norm(compiled):
    torch.manual_seed(0)
    shape = (2, 4, 32, 32)
    features = torch.randn(shape) + torch.tensor([0.0, 1e2, 1e4, -1e4])[:, None, None]
    features = features.contiguous(memory_format=torch.channels_last)
    norm, slopes = nn.BatchNorm2d(4, EPSILON, MOMENTUM), torch.randn(shape)
    exact, own = exact_copy(norm), exact_copy(norm).float()
    found = results(norm, None, features, slopes)
    wanted = results(exact, None, features.double(), slopes)
    torchs = own(features)
    error = (found["output"] - wanted["output"]).abs().amax((0, 2, 3))
    usual = (torchs - wanted["output"]).abs().amax((0, 2, 3))
    assert (error <= 2 * usual + 1e-5).all()
    torch.testing.assert_close(
        found["running_var"].double(), wanted["running_var"], rtol=1e-5, atol=0
    )


def test_a_channel_of_one_value_gives_its_bias(compiled):
    features = torch.full((2, 3, 8, 8), 7.0).contiguous(memory_format=torch.channels_last)
    norm = make_norm(3)
    output = norm_activation(norm, None, features.requires_grad_())
    expected = norm.bias.detach()[:, None, None].expand(output.shape)
    torch.testing.assert_close(output.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_swish_of_large_numbers_is_the_number_or_nothing(size, compiled):
    """The features are -1 and 1 in each channel, so that the norm gives about -size and size."""
    features = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    features = features.contiguous(memory_format=torch.channels_last).requires_grad_()
    norm = nn.BatchNorm2d(3, EPSILON)
    nn.init.constant_(norm.weight, size)
    output = norm_activation(norm, nn.SiLU(), features)
    output.sum().backward()
    scale = size / (1 + EPSILON) ** 0.5
    torch.testing.assert_close(output[1].detach(), torch.full((3, 4, 4), scale))
    assert output[0].abs().max() <= 1e-4
    assert features.grad.isfinite().all()


def test_what_is_no_number_stays_in_its_channel(compiled):
    features = drawn((2, 20, 6, 6))
    features[1, 7, 2, 3] = torch.nan
    norm = make_norm(20)
    output = norm_activation(norm, nn.SiLU(), features.requires_grad_())
    wrong = output.isnan().flatten(2).all(2).all(0)
    assert wrong.nonzero().tolist() == [[7]]
    assert output.isnan().sum() == output[:, 7].numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, SEVERAL_THREADS], ids=str)
def test_the_product_with_gates_has_torchs_gradients(shape, dtype, compiled):
    torch.manual_seed(0)
    features, slopes = drawn(shape, dtype), torch.randn(shape).to(dtype)
    gates = torch.rand(*shape[:2], 1, 1).to(dtype)
    given = [features.clone().requires_grad_(), gates.clone().requires_grad_()]
    with threads(THREADS):
        output = scale_channels(*given)
        found = torch.autograd.grad(output, given, slopes)
    exact = [features.double().requires_grad_(), gates.double().requires_grad_()]
    wanted = torch.autograd.grad(exact[0] * exact[1], exact, slopes.double())
    assert compiled == [f"scale_backward_{functions.NAMES[dtype]}"]
    assert torch.equal(output, features * gates)
    names = ("features", "gates")
    assert_near(
        dict(zip(names, found, strict=True)),
        dict(zip(names, wanted, strict=True)),
        TOLERANCES[dtype],
    )


def focal(logits: Tensor, classes: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    given = logits.detach().requires_grad_()
    loss = focal_loss_sum(given, classes, kept, 0.25, 1.5)
    loss.backward()
    return loss.detach(), given.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 5, 16, 90])
def test_the_focal_loss_and_its_gradient_are_torchvisions(width, dtype, compiled):
    torch.manual_seed(0)
    anchors = 2**20 // width  # enough for three threads
    logits = (torch.randn(1, anchors, width) * 8).to(dtype)
    classes = torch.randint(-3, width, (1, anchors))
    kept = (torch.rand(1, anchors) < 0.9) | (classes >= 0)
    exact = logits.double().requires_grad_()
    there = (classes[..., None] == torch.arange(width)).double()
    wanted = sigmoid_focal_loss(exact[kept], there[kept], 0.25, 1.5, "sum")
    wanted.backward()
    with threads(THREADS):
        loss, slopes = focal(logits, classes, kept)
    assert compiled == [f"focal_{functions.NAMES[dtype]}"]
    assert slopes.dtype == dtype
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-6, atol=0)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(slopes.double(), exact.grad, rtol=rounding, atol=1e-12)
    assert not slopes[~kept].any()


def test_the_focal_loss_of_no_number_is_none(compiled):
    logits = torch.zeros(1, 4, 20)
    logits[0, 2, 17] = torch.nan
    loss, slopes = focal(logits, torch.full((1, 4), -1), torch.ones(1, 4, dtype=torch.bool))
    assert loss.isnan()
    assert slopes.isnan().nonzero().tolist() == [[0, 2, 17]]


def test_a_class_that_the_logits_do_not_have_is_refused_as_torch_refuses_it(compiled):
    with pytest.raises(RuntimeError, match="out of bounds"):
        focal(torch.zeros(1, 4, 3), torch.tensor([[0, -1, 3, 1]]), torch.ones(1, 4).bool())
    assert compiled == ["focal_float32"]


def test_the_focal_loss_of_no_anchors_is_zero(compiled):
    loss, _ = focal(torch.zeros(2, 0, 3), torch.zeros(2, 0).long(), torch.zeros(2, 0).bool())
    assert loss == 0


def hooked(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda _module, _inputs, output: output * 2)
    return norm


def changed(**values: object) -> nn.BatchNorm2d:
    norm = make_norm(8)
    for name, value in values.items():
        setattr(norm, name, value)
    return norm


LEFT_TO_TORCH = {
    "evaluation": (lambda: make_norm(8).eval(), nn.SiLU(), drawn),
    "another activation": (lambda: make_norm(8), nn.ReLU(), drawn),
    "another norm": (lambda: nn.GroupNorm(2, 8), nn.SiLU(), drawn),
    "a hook": (lambda: hooked(make_norm(8)), nn.SiLU(), drawn),
    "another layout": (lambda: make_norm(8), None, lambda shape: drawn(shape).contiguous()),
    "another format": (lambda: make_norm(8).double(), None, lambda shape: drawn(shape).double()),
    "no weights": (lambda: nn.BatchNorm2d(8, affine=False), None, drawn),
    "no statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), None, drawn),
    "statistics left alone": (lambda: changed(track_running_stats=False), None, drawn),
    "weights with gaps": (
        lambda: changed(weight=nn.Parameter(torch.arange(16.0)[::2])),
        None,
        drawn,
    ),
}


def test_a_norm_of_another_width_is_refused_as_torch_refuses_it(compiled):
    with pytest.raises(RuntimeError, match="running_mean should contain 16 elements not 8"):
        norm_activation(make_norm(8), None, drawn((2, 16, 4, 4)))


def test_statistics_in_another_format_are_refused_as_torch_refuses_them(compiled):
    norm = changed(running_var=torch.ones(8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="expected scalar type"):
        norm_activation(norm, None, drawn((2, 8, 4, 4)))


@pytest.mark.parametrize("gates", [torch.rand(1, 8, 1, 1), torch.rand(2, 1, 1, 1), torch.rand(())])
def test_gates_of_another_shape_are_left_to_torch(gates, compiled):
    features = drawn((2, 8, 4, 4)).requires_grad_()
    assert torch.equal(scale_channels(features, gates), features * gates)
    assert not compiled


def test_gates_that_repeat_their_numbers_have_torchs_gradients(compiled):
    features, slopes = drawn((3, 8, 4, 4)), torch.randn(3, 8, 4, 4)
    few = torch.rand(1, 8, 1, 1)
    found, wanted = [], []
    for product, kept in ((scale_channels, found), (torch.mul, wanted)):
        given = [features.clone().requires_grad_(), few.clone().requires_grad_()]
        output = product(given[0], given[1].expand(3, 8, 1, 1))
        kept += torch.autograd.grad(output, given, slopes)
    assert compiled
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "logits", [torch.randn(1, 40, 9)[..., :5], torch.randn(1, 5, 40).transpose(1, 2)]
)
def test_logits_in_another_order_have_the_loss_of_their_copy(logits, compiled):
    torch.manual_seed(0)
    classes, kept = torch.randint(-1, 5, (1, 40)), torch.ones(1, 40, dtype=torch.bool)
    wanted = focal(logits.contiguous(), classes, kept)
    torch.testing.assert_close(focal(logits, classes, kept), wanted)
    torch.testing.assert_close(focal(logits, classes.int(), kept.float()), wanted)
    assert compiled == 3 * ["focal_float32"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_torchs_default_format_and_device_change_nothing(dtype, compiled):
    torch.manual_seed(0)
    features, slopes, norm = drawn((2, 8, 4, 4)), torch.randn(2, 8, 4, 4), make_norm(8)
    twin = make_norm(8)
    twin.load_state_dict(norm.state_dict())
    wanted = results(twin, nn.SiLU(), features, slopes)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = results(norm, nn.SiLU(), features, slopes)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(compiled) == 4
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_tensors_without_memory_are_left_to_torch(compiled):
    with FakeTensorMode():
        features = torch.empty(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
        assert norm_activation(nn.BatchNorm2d(8), nn.SiLU(), features).shape == features.shape
    assert not compiled


def test_a_slice_of_a_convolution_with_its_norm_is_a_sequence(compiled):
    layers = conv_norm(3, 8, activation="swish")
    features = drawn((2, 3, 4, 4))
    assert torch.equal(layers[:1](features), layers[0](features))
    layers.append(nn.Dropout(1.0))
    assert not layers(features).any()


@pytest.mark.parametrize("case", LEFT_TO_TORCH)
def test_other_norms_and_activations_are_left_to_torch(case, compiled):
    make, activation, draw = LEFT_TO_TORCH[case]
    torch.manual_seed(0)
    features = draw((2, 8, 4, 4))
    norm, twin = make(), make()
    twin.load_state_dict(norm.state_dict())
    found = norm_activation(norm, activation, features)
    expected = twin(features)
    assert not compiled
    assert torch.equal(found, expected if activation is None else activation(expected))


def test_without_gradients_all_is_left_to_torch(compiled):
    features, norm = drawn((2, 8, 4, 4)), make_norm(8)
    with torch.no_grad():
        norm_activation(norm, nn.SiLU(), features)
        scale_channels(features, torch.rand(2, 8, 1, 1))
    assert not compiled


def test_one_number_a_channel_is_refused_as_torch_refuses_it():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm_activation(make_norm(8), None, drawn((1, 8, 1, 1)))


def test_a_model_trains_as_near_to_the_exact_one_as_its_twin_of_torchs_parts(compiled):
    torch.manual_seed(0)
    options = {"num_classes": 3, "stochastic_depth": 0.0}
    model, twin, exact = (create_model("eff_spinenet_m0", **options) for _ in range(3))
    for other in (twin, exact):
        other.load_state_dict(model.state_dict())
        make_plain(other)
    exact.double()
    images = torch.randn(2, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    target = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0]]), "labels": torch.tensor([1])}
    found = []
    for network in (model, twin, exact):
        network.train().to(memory_format=torch.channels_last)
        losses = network(images.to(next(network.parameters()).dtype), [target, target])
        torch.stack(list(losses.values())).sum().backward()
        gradients = torch.cat([value.grad.flatten() for value in network.parameters()])
        statistics = torch.cat([value.flatten() for value in network.buffers()])
        found.append((losses, gradients.double(), statistics.double()))
    called = {"forward_float32", "forward_float32_swish", "scale_backward_float32", "focal_float32"}
    assert called <= set(compiled)
    own, torchs, wanted = found
    for name, loss in wanted[0].items():
        torch.testing.assert_close(own[0][name], loss, rtol=1e-4, atol=0, check_dtype=False)
    for kind in (1, 2):
        usual = (torchs[kind] - wanted[kind]).norm()
        assert 0 < (own[kind] - wanted[kind]).norm() < 2 * usual < 0.1 * wanted[kind].norm()


def test_without_a_compiler_torch_computes_it(fresh_library, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "")
    torch.manual_seed(0)
    features, norm = drawn((2, 8, 4, 4)), make_norm(8)
    twin = make_norm(8)
    twin.load_state_dict(norm.state_dict())
    with caplog.at_level(logging.INFO):
        found = norm_activation(norm, nn.SiLU(), features)
    assert torch.equal(found, nn.functional.silu(twin(features)))
    assert "no C++ compiler" in caplog.text


@pytest.mark.parametrize("command", ["false", "no-such-compiler", "g++ '"])
def test_a_compiler_that_fails_is_reported_once_and_leaves_nothing(
    command, fresh_library, monkeypatch, tmp_path: Path, caplog
):
    monkeypatch.setenv("CXX", command)
    monkeypatch.setenv("EFFSPINENET_CACHE", str(tmp_path))
    assert library.load_library() is None
    assert library.load_library() is None
    assert caplog.text.count("cannot be used") == 1
    assert not list(tmp_path.rglob("*.so"))


def test_a_request_to_stop_while_compiling_is_heard(fresh_library, monkeypatch, tmp_path: Path):
    def stopped(*_args: object, **_options: object) -> None:
        raise Preempted("stopped")

    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setenv("EFFSPINENET_CACHE", str(tmp_path))
    monkeypatch.setattr(library.subprocess, "run", stopped)
    with pytest.raises(Preempted):
        library.load_library()


def test_what_does_not_load_is_compiled_anew(compiled, fresh_library, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("EFFSPINENET_CACHE", str(tmp_path))
    (tmp_path / "native").mkdir()
    broken = tmp_path / "native" / f"{library._key(library._compiler())}.so"
    broken.write_bytes(b"made on another machine")
    assert library.load_library() is not None
    assert broken.stat().st_size > 1000


def test_what_is_compiled_is_kept_for_the_next_process(
    compiled, fresh_library, monkeypatch, tmp_path: Path
):
    monkeypatch.setenv("EFFSPINENET_CACHE", str(tmp_path))
    assert library.load_library() is not None
    (kept,) = (tmp_path / "native").glob("*.so")
    made = kept.stat().st_mtime_ns
    library.load_library.cache_clear()
    assert library.load_library() is not None
    assert kept.stat().st_mtime_ns == made
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-DNDEBUG"))
    library.load_library.cache_clear()
    assert library.load_library() is not None
    assert len(list((tmp_path / "native").glob("*.so"))) == 2


def test_an_unwritable_cache_leaves_it_to_torch(
    compiled, fresh_library, monkeypatch, tmp_path: Path, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EFFSPINENET_CACHE", str(tmp_path / "file"))
    assert library.load_library() is None
    assert "cannot be used" in caplog.text
