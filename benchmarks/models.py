"""Training and inference against effdet, torchvision and the plain way; needs the extra `bench`.

All models of a comparison have the same image size, batch, memory layout (channels last), optimizer
and objects. Peers get `disable_malloc_trim` too, for it acts on the whole process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import effdet
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.models import detection as torchvision_models

from benchmarks.pairs import Times, compare, fastest, time_in_turn
from benchmarks.plain import make_plain
from benchmarks.record import Figure, ratio_figure
from effspinenet_lib import create_model
from effspinenet_lib.data import Batch
from effspinenet_lib.models.retinanet import RetinaNet
from effspinenet_lib.training.device import prepare_model
from effspinenet_lib.training.export import inference_copy
from effspinenet_lib.training.loop import train_steps
from effspinenet_lib.training.optim import build_optimizer
from effspinenet_lib.training.recipes import Recipe, get_recipe

Work = Callable[[], object]
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLASSES = 90
BATCH, SIZE = 2, 512
SSDLITE_SIZE = 320
PROXY_BATCH, PROXY_SIZE, PROXY_CLASSES = 8, 128, 8
RATE = 1e-4
OURS, EFFDET, RETINANET, SSDLITE = "ours", "effdet", "RetinaNet", "SSDLite"
# Shares of the image's side: three objects, small to large.
OBJECTS = ((0.02, 0.02, 0.12, 0.12), (0.15, 0.05, 0.5, 0.2), (0.2, 0.3, 0.9, 0.8))


@dataclass(frozen=True)
class Setting:
    """What the models of a comparison have in common."""

    size: int
    batch: int

    def __str__(self) -> str:
        return f"{self.size}x{self.size}, batch {self.batch}"

    def images(self) -> Tensor:
        drawn = torch.randn(self.batch, 3, self.size, self.size)
        return drawn.contiguous(memory_format=torch.channels_last)

    def targets(self, classes: int = CLASSES) -> list[dict[str, Tensor]]:
        target = {
            "boxes": torch.tensor(OBJECTS) * self.size,
            "labels": torch.arange(len(OBJECTS)) % classes,
            "iscrowd": torch.zeros(len(OBJECTS), dtype=torch.bool),
        }
        return [target] * self.batch


def training(rounds: int, quick: bool) -> Iterator[Figure]:
    """A training step of Eff-SpineNet-D0 against those of the peers."""
    del quick
    setting = Setting(SIZE, BATCH)
    works = {
        f"{name} {precision}": make(setting, precision)
        for precision in PRECISIONS
        for name, make in ((OURS, our_step), (EFFDET, _effdet_step), (RETINANET, _retinanet_step))
    }
    times = time_in_turn(works, rounds)
    what = "training, Eff-SpineNet-D0 against"
    yield from _against(times, EFFDET, f"{what} effdet's EfficientDet-D0", setting, (1.0, 1.5))
    yield from _against(times, RETINANET, f"{what} torchvision's RetinaNet", setting)
    small = Setting(SSDLITE_SIZE, BATCH)
    works = {
        f"{name} {precision}": make(small, precision)
        for precision in PRECISIONS
        for name, make in ((OURS, our_step), (SSDLITE, _ssdlite_step))
    }
    times = time_in_turn(works, rounds)
    yield from _against(times, SSDLITE, f"{what} torchvision's SSDLite", small)


def inference(rounds: int, quick: bool) -> Iterator[Figure]:
    """One image through the networks; of torchvision's models with what follows the network."""
    del quick
    setting = Setting(SIZE, 1)
    works = {
        f"{name} {precision}": make(setting, precision)
        for precision in PRECISIONS
        for name, make in ((OURS, _our_network), (EFFDET, _effdet_network), (RETINANET, _retinanet))
    }
    times = time_in_turn(works, rounds)
    what = "inference, Eff-SpineNet-D0 against"
    yield from _against(times, EFFDET, f"{what} effdet's EfficientDet-D0", setting, (1.0, 1.3))
    yield from _against(times, RETINANET, f"{what} torchvision's RetinaNet", setting)
    small = Setting(SSDLITE_SIZE, 1)
    works = {
        f"{name} {precision}": make(small, precision)
        for precision in PRECISIONS
        for name, make in ((OURS, _our_network), (SSDLITE, _ssdlite))
    }
    times = time_in_turn(works, rounds)
    yield from _against(times, SSDLITE, f"{what} torchvision's SSDLite", small)


def proxy(rounds: int, quick: bool) -> Iterator[Figure]:
    """A training step of the proxy runs against the same network written the plain way."""
    del quick
    setting = Setting(PROXY_SIZE, PROXY_BATCH)
    works = {f"{OURS} {precision}": proxy_step(setting, precision) for precision in PRECISIONS}
    plain = plain_step(setting, "bfloat16", "eff_spinenet_m0")
    times = time_in_turn({**works, "plain": plain}, rounds)
    for precision in reversed(PRECISIONS):
        yield ratio_figure(
            "proxy",
            "training Eff-SpineNet-M0 against the plain loop",
            f"{precision} against bfloat16, {setting}",
            compare(times[f"{OURS} {precision}"], times["plain"]),
            1.3,
        )


def _against(
    times: Times,
    peer: str,
    what: str,
    setting: Setting,
    goals: tuple[float | None, float | None] = (None, None),
) -> Iterator[Figure]:
    """The ratio in float32, and that of each one's faster dtype."""
    benchmark = what.split(",")[0]
    found = {
        name: {key: value for key, value in times.items() if key.split()[0] == name}
        for name in (OURS, peer)
    }
    ours, theirs = fastest(found[OURS]), fastest(found[peer])
    yield ratio_figure(
        benchmark,
        what,
        f"float32, {setting}",
        compare(times[f"{OURS} float32"], times[f"{peer} float32"]),
        goals[0],
    )
    if len(found[OURS]) == 1:  # --quick times one dtype
        return
    formats = f"{ours.split()[1]} against {theirs.split()[1]}, the faster of each"
    yield ratio_figure(
        benchmark, what, f"{formats}, {setting}", compare(times[ours], times[theirs]), goals[1]
    )


def our_training(name: str, setting: Setting, recipe: Recipe, classes: int) -> Work:
    """A step of this library's loop."""
    accelerator = Accelerator(cpu=True)
    model = prepare_model(create_model(name, num_classes=classes), recipe, accelerator)
    optimizer = build_optimizer(model, recipe)
    batch = Batch(
        setting.images(),
        setting.targets(classes),
        tuple(range(setting.batch)),
        torch.ones(setting.batch, 2),
        [(setting.size, setting.size)] * setting.batch,
    )
    batches = itertools.repeat(batch)
    steps = train_steps(model, optimizer, batches, recipe, accelerator, seed=0)
    return lambda: next(steps)


def our_step(setting: Setting, precision: str) -> Work:
    """A step of Eff-SpineNet-D0."""
    recipe = get_recipe("proxy_detection").replace(precision=precision)
    return our_training("eff_spinenet_d0", setting, recipe, CLASSES)


def proxy_step(setting: Setting, precision: str = "bfloat16") -> Work:
    """A step of Eff-SpineNet-M0 by the proxy's recipe."""
    recipe = get_recipe("proxy_detection").replace(precision=precision)
    return our_training("eff_spinenet_m0", setting, recipe, PROXY_CLASSES)


def plain_step(setting: Setting, precision: str, name: str = "eff_spinenet_d0") -> Work:
    """The loop that one writes first, over the plain twin of a model of this library."""
    model = create_model(name, num_classes=PROXY_CLASSES if name.endswith("m0") else CLASSES)
    assert isinstance(model, RetinaNet)
    plain = make_plain(model)
    targets = setting.targets(PROXY_CLASSES)
    return _step(plain, setting, precision, lambda images: plain(images, targets), fused=None)


def _effdet_step(setting: Setting, precision: str) -> Work:
    model = effdet.create_model(
        "efficientdet_d0",
        bench_task="train",
        bench_labeler=True,
        num_classes=CLASSES,
        pretrained=False,
        pretrained_backbone=False,
        image_size=(setting.size, setting.size),
    )
    targets = setting.targets()
    given = {
        "bbox": [target["boxes"][:, [1, 0, 3, 2]] for target in targets],
        "cls": [target["labels"] + 1 for target in targets],
    }
    return _step(model, setting, precision, lambda images: {"loss": model(images, given)["loss"]})


def _retinanet_step(setting: Setting, precision: str) -> Work:
    return _torchvision_step(_make_retinanet(setting), setting, precision)


def _ssdlite_step(setting: Setting, precision: str) -> Work:
    return _torchvision_step(_make_ssdlite(), setting, precision)


def _torchvision_step(model: nn.Module, setting: Setting, precision: str) -> Work:
    targets = setting.targets()
    return _step(model, setting, precision, lambda images: model(list(images), targets))


def _step(
    model: nn.Module,
    setting: Setting,
    precision: str,
    losses: Callable[[Tensor], dict[str, Tensor]],
    fused: bool | None = True,
) -> Work:
    """A step of a model as its users write it; with this library's optimizer if `fused`."""
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, fused=fused)
    images = setting.images()

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            found = losses(images)
        torch.stack([loss.float() for loss in found.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


class _Network(nn.Module):
    """What effdet's model computes: the outputs of the heads."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> object:
        return self.model.network(images)


def _our_network(setting: Setting, precision: str) -> Work:
    model = inference_copy(create_model("eff_spinenet_d0", num_classes=CLASSES))
    return _in_format(_Network(model), setting, precision)


def _effdet_network(setting: Setting, precision: str) -> Work:
    model = effdet.create_model(
        "efficientdet_d0",
        num_classes=CLASSES,
        pretrained=False,
        pretrained_backbone=False,
        image_size=(setting.size, setting.size),
    )
    return _in_format(model, setting, precision)


def _retinanet(setting: Setting, precision: str) -> Work:
    return _torchvision_inference(_make_retinanet(setting), setting, precision)


def _ssdlite(setting: Setting, precision: str) -> Work:
    return _torchvision_inference(_make_ssdlite(), setting, precision)


def _torchvision_inference(model: nn.Module, setting: Setting, precision: str) -> Work:
    """Under autocast: torchvision's suppression takes no bfloat16."""
    model.eval().to(memory_format=torch.channels_last)
    return _inference(lambda images: model(list(images)), setting.images(), precision)


def _in_format(network: nn.Module, setting: Setting, precision: str) -> Work:
    """A network whose weights have the dtype: casting them each time costs more."""
    dtype = PRECISIONS[precision]
    network.eval().to(memory_format=torch.channels_last).to(dtype)
    return _inference(network, setting.images().to(dtype), "float32")


def _inference(run: Callable[[Tensor], object], images: Tensor, precision: str) -> Work:
    def work() -> None:
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            run(images)

    return work


def _make_retinanet(setting: Setting) -> nn.Module:
    model: nn.Module = torchvision_models.retinanet_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES,
        min_size=setting.size,
        max_size=setting.size,
    )
    return model


def _make_ssdlite() -> nn.Module:
    model: nn.Module = torchvision_models.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1
    )
    return model
