"""Training and inference against effdet, torchvision and the plain way; needs the extra `bench`.

All models of a comparison have the same image size, batch, memory layout (channels last), optimizer
and objects. Peers get `disable_malloc_trim` too, for it acts on the whole process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import effdet
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torchvision.models import detection as torchvision_models

from benchmarks.pairs import compare, fastest, time_in_turn
from benchmarks.plain import make_plain
from benchmarks.record import Figure, ratio_figure
from effspinenet_lib import create_model
from effspinenet_lib.data.loader import Batch
from effspinenet_lib.models.base import TaskModel
from effspinenet_lib.models.retinanet import RetinaNet
from effspinenet_lib.training.device import prepare_model
from effspinenet_lib.training.export import inference_copy
from effspinenet_lib.training.loop import train_steps
from effspinenet_lib.training.optim import build_optimizer
from effspinenet_lib.training.recipes import get_recipe

Work = Callable[[], object]
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLASSES = 90
BATCH, SIZE = 2, 512
SSDLITE_SIZE = 320
PROXY_BATCH, PROXY_SIZE, PROXY_CLASSES = 8, 128, 8
RATE = 1e-4
OURS, EFFDET, RETINANET, SSDLITE = "ours", "effdet", "RetinaNet", "SSDLite"
PEERS = {
    EFFDET: "effdet's EfficientDet-D0",
    RETINANET: "torchvision's RetinaNet",
    SSDLITE: "torchvision's SSDLite",
}
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


Maker = Callable[[Setting, str], Work]


def training(rounds: int, quick: bool) -> Iterator[Figure]:
    """A training step of Eff-SpineNet-D0 against those of the peers."""
    peers = {EFFDET: _effdet_step, RETINANET: partial(_torchvision_step, _make_retinanet)}
    yield from _against("training", Setting(SIZE, BATCH), our_step, peers, rounds, quick, 1.5)
    small = Setting(SSDLITE_SIZE, BATCH)
    peers = {SSDLITE: partial(_torchvision_step, _make_ssdlite)}
    yield from _against("training", small, our_step, peers, rounds, quick)


def inference(rounds: int, quick: bool) -> Iterator[Figure]:
    """One image through the networks; of torchvision's models with what follows the network."""
    peers = {EFFDET: _effdet_network, RETINANET: partial(_torchvision, _make_retinanet)}
    yield from _against("inference", Setting(SIZE, 1), _our_network, peers, rounds, quick, 1.3)
    small = Setting(SSDLITE_SIZE, 1)
    peers = {SSDLITE: partial(_torchvision, _make_ssdlite)}
    yield from _against("inference", small, _our_network, peers, rounds, quick)


def proxy(rounds: int, quick: bool) -> Iterator[Figure]:
    """A training step of the proxy runs against the same network written the plain way."""
    setting = Setting(PROXY_SIZE, PROXY_BATCH)
    for precision in _precisions(quick):
        plain = plain_step(setting, precision, "eff_spinenet_m0")
        times = time_in_turn({OURS: proxy_step(setting, precision), "plain": plain}, rounds)
        yield ratio_figure(
            "proxy",
            "training Eff-SpineNet-M0 against the plain loop",
            f"{precision}, {setting}",
            compare(times[OURS], times["plain"]),
        )


def _precisions(quick: bool) -> tuple[str, ...]:
    """Those to time; bfloat16 can take ten times as long where the CPU lacks it."""
    return ("float32",) if quick else tuple(PRECISIONS)


def _against(
    benchmark: str,
    setting: Setting,
    ours: Maker,
    peers: Mapping[str, Maker],
    rounds: int,
    quick: bool,
    goal: float | None = None,
) -> Iterator[Figure]:
    """Each peer's ratio in float32, and that of each one's faster dtype.

    Against effdet there are goals: 1 in float32, `goal` in the faster dtypes.
    """
    precisions = _precisions(quick)
    works = {
        f"{name} {precision}": make(setting, precision)
        for precision in precisions
        for name, make in {OURS: ours, **peers}.items()
    }
    times = time_in_turn(works, rounds)

    def fastest_of(name: str) -> str:
        return fastest({f"{name} {p}": times[f"{name} {p}"] for p in precisions})

    for peer in peers:
        what = f"{benchmark}, Eff-SpineNet-D0 against {PEERS[peer]}"
        mine, other = fastest_of(OURS), fastest_of(peer)
        faster = f"{mine.split()[1]} against {other.split()[1]}, the faster of each"
        goals = (1.0, goal) if peer == EFFDET else (None, None)
        rows = [("float32", f"{OURS} float32", f"{peer} float32", goals[0])]
        if len(precisions) > 1:
            rows.append((faster, mine, other, goals[1]))
        for text, own, theirs, wanted in rows:
            ratio = compare(times[own], times[theirs])
            yield ratio_figure(benchmark, what, f"{text}, {setting}", ratio, wanted)


def our_training(name: str, setting: Setting, precision: str, classes: int) -> Work:
    """A step of this library's loop by the proxy's recipe."""
    recipe = get_recipe("proxy_detection").replace(precision=precision)
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
    return our_training("eff_spinenet_d0", setting, precision, CLASSES)


def proxy_step(setting: Setting, precision: str = "bfloat16") -> Work:
    """A step of Eff-SpineNet-M0."""
    return our_training("eff_spinenet_m0", setting, precision, PROXY_CLASSES)


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


def _torchvision_step(
    make: Callable[[Setting], nn.Module], setting: Setting, precision: str
) -> Work:
    model, targets = make(setting), setting.targets()
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

    def __init__(self, model: TaskModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> object:
        return self.model.network(images)


def _our_network(setting: Setting, precision: str) -> Work:
    model = create_model("eff_spinenet_d0", num_classes=CLASSES)
    return _in_dtype(_Network(inference_copy(model)), setting, precision)


def _effdet_network(setting: Setting, precision: str) -> Work:
    model = effdet.create_model(
        "efficientdet_d0",
        num_classes=CLASSES,
        pretrained=False,
        pretrained_backbone=False,
        image_size=(setting.size, setting.size),
    )
    return _in_dtype(model, setting, precision)


def _torchvision(make: Callable[[Setting], nn.Module], setting: Setting, precision: str) -> Work:
    """Under autocast: torchvision's suppression takes no bfloat16."""
    model = make(setting).eval().to(memory_format=torch.channels_last)
    return _inference(lambda images: model(list(images)), setting.images(), precision)


def _in_dtype(network: nn.Module, setting: Setting, precision: str) -> Work:
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


def _make_ssdlite(_: Setting) -> nn.Module:
    model: nn.Module = torchvision_models.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1
    )
    return model
