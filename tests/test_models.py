"""One contract for every model and task: build, train a step, predict, save and load."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from effspinenet_lib import create_backbone, create_model, list_models
from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.models import specs
from effspinenet_lib.models.base import TaskModel
from effspinenet_lib.models.specs import TASKS
from effspinenet_lib.models.weights import save_weights
from effspinenet_lib.models.zoo import default_image_size, known_options, model_entry
from effspinenet_lib.training.checkpoint import create_from_weights
from effspinenet_lib.training.export import export_model

SIDE, CLASSES = 64, 3
# Models that differ from another in numbers alone are left out, but for one with repeats.
SCALED = re.compile(r"(eff_spinenet|sp_efficientnet|efficientdet|efficientnet_b|mobile_spinenet).*")
TRIED = {
    "eff_spinenet_m0": tuple(TASKS),
    **dict.fromkeys(("eff_spinenet_d1", "efficientdet_d0", "efficientnet_b0_fpn"), ("detection",)),
    **{"mobile_spinenet_49xs": ("detection",), "efficientnet_b0": ("classification",)},
}
PAIRS = [
    (name, task)
    for name in list_models()
    for task in TRIED.get(name, () if SCALED.match(name) else model_entry(name).image_sizes)
]


def make_targets(task: str) -> list[dict[str, Tensor]]:
    """Two images: one with two objects, one with one."""
    if task == "classification":
        return [{"label": torch.tensor(2)}, {"label": torch.tensor(0)}]
    if task == "segmentation":
        labels = torch.zeros(SIDE, SIDE, dtype=torch.int64)
        labels[:20, :30], labels[40:] = 1, 2
        ignored = labels.clone()
        ignored[:, 50:] = 255
        return [{"semantic": labels}, {"semantic": ignored}]
    boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [30.0, 30.0, 62.0, 60.0]])
    masks = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
    masks[0, 6:44, 4:40] = masks[1, 32:58, 33:60] = True
    whole = {"boxes": boxes, "labels": torch.tensor([2, 0]), "masks": masks}
    return [whole, {name: value[:1] for name, value in whole.items()}]


def outputs_of(model: TaskModel, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        outputs = model.network(images)
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_a_step_of_training_and_the_way_through_a_file(
    name: str, task: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = create_model(name, task, CLASSES)
    images = torch.randn(2, 3, SIDE, SIDE)
    model.train()
    losses = model(images, make_targets(task))
    assert isinstance(losses, dict)
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    sum(losses.values(), torch.zeros(())).backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
    # A norm over two values has huge gradients, so the step is a short one.
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()

    path = tmp_path / "model.safetensors"
    facts = {"model": name, "task": task, "num_classes": CLASSES, "options": {}}
    facts |= {"categories": [], "image_size": SIDE}
    save_weights(path, model.state_dict(), facts)
    again, _ = create_from_weights(path)
    model.eval()
    for ours, theirs in zip(outputs_of(model, images), outputs_of(again, images), strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        predictions = model(images)
    assert len(predictions) == 2
    for prediction in predictions:
        check_prediction(task, prediction)


def check_prediction(task: str, prediction: dict[str, Tensor]) -> None:
    if task == "classification":
        assert prediction["scores"].shape == (CLASSES,)
        assert float(prediction["scores"].sum()) == pytest.approx(1, abs=1e-5)
    elif task == "segmentation":
        assert prediction["logits"].shape == (CLASSES, SIDE, SIDE)
    else:
        count = len(prediction["boxes"])
        assert prediction["boxes"].shape == (count, 4)
        assert prediction["scores"].shape == prediction["labels"].shape == (count,)
        assert (prediction["labels"] < CLASSES).all()
        assert (prediction["scores"].diff() <= 0).all()
        if task == "instances":
            assert prediction["masks"].shape == (count, 28, 28)


@pytest.mark.parametrize("task", ["detection", "instances"])
def test_an_exported_program_gives_what_the_network_gives(task: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("eff_spinenet_m0", task, CLASSES).eval()
    path = export_model(model, 128, tmp_path / "model.pt2")
    program: Any = torch.export.load(path).module()
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        exported = program(images)
    exported = exported if isinstance(exported, tuple | list) else [exported]
    for ours, theirs in zip(outputs_of(model, images), exported, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_one_more_scaled_model_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README says: an entry of `SCALES` or `MODELS` is all that it takes."""
    scale = specs.Scale("X", 320, 0.65, 1.0, head_dim=48)
    monkeypatch.setitem(specs.SCALES, "X", scale)
    spec = specs.ModelSpec("eff_spinenet_x", specs.LEARNED_BETAS, "X")
    monkeypatch.setitem(specs.MODELS, spec.name, spec)
    assert list_models()["eff_spinenet_x"] == ()
    assert default_image_size("eff_spinenet_x") == 320

    def parameters(name: str, task: str) -> int:
        with torch.device("meta"):
            model = create_model(name, task, CLASSES)
        return sum(p.numel() for p in model.parameters())

    for task in TASKS:
        smaller, size, larger = (parameters(f"eff_spinenet_{s}", task) for s in ("m1", "x", "m2"))
        assert smaller < size < larger


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        ({"name": "eff_spinnet_d0"}, "eff_spinenet_d0"),
        ({"name": "eff_spinenet_m0", "task": "detect"}, "detection"),
        ({"name": "resnet50_fpn", "task": "classification"}, r"resnet50_fpn.*detection"),
        ({"name": "eff_spinenet_m0", "space2depth": True}, "space_to_depth"),
        ({"name": "resnet50_fpn", "activation": "swich"}, "swish"),
    ],
)
def test_unknown_names_list_the_near_ones(arguments: dict[str, Any], near: str) -> None:
    with pytest.raises(UnknownName, match=near):
        create_model(**arguments)


@pytest.mark.parametrize(
    ("name", "task", "options", "message"),
    [
        ("eff_spinenet_m0", "detection", {"num_classes": 0}, "at least one class"),
        ("eff_spinenet_m0", "classification", {"dropout": 1}, "dropout is 1; .* 0 to below 1"),
        ("resnet50_fpn", "detection", {"stochastic_depth": 1.0}, "stochastic_depth is 1.0"),
        ("mobilenetv2_nas_fpn", "detection", {"repeats": 1.5}, "repeats is 1.5; .*positive"),
        ("resnet101_deeplabv3", "segmentation", {"output_stride": 4}, "4; it must be 8 or 16"),
        ("resnet101_deeplabv3", "segmentation", {"output_stride": "16"}, "must be 8 or 16"),
    ],
)
def test_invalid_values_are_refused(
    name: str, task: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name, task, **options)


def test_known_options_are_the_builders() -> None:
    assert known_options("resnet50_fpn") == ("stochastic_depth", "activation")
    assert model_entry("resnet50_fpn").options == {"stochastic_depth": 0.2, "activation": "swish"}


# ---- beside torchvision

NAMES = [f"P{level}" for level in specs.OUTPUT_LEVELS]


def torchvision_targets(iscrowd: Tensor | None) -> list[dict[str, Any]]:
    """Targets as torchvision's detection references make them: labels from 1, an empty image."""
    (whole, _) = make_targets("instances")
    found: dict[str, Any] = {
        "boxes": whole["boxes"],
        "labels": torch.tensor([90, 1]),
        "masks": whole["masks"].to(torch.uint8),
        "image_id": 139,
        "area": torch.tensor([1368.0, 960.0]),
    }
    if iscrowd is not None:
        found["iscrowd"] = iscrowd
    rows = {"boxes", "labels", "masks", "area", "iscrowd"}
    empty = {key: value[:0] if key in rows else value for key, value in found.items()}
    return [found, empty]


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("eff_spinenet_m0", "detection"),
        ("eff_spinenet_m0", "instances"),
        ("mobilenetv3_small_ssdlite", "detection"),
    ],
)
def test_targets_of_torchvisions_references_train(name: str, task: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, task, 91).train()
    images = torch.randn(2, 3, SIDE, SIDE)

    def losses(iscrowd: Tensor | None) -> list[float]:
        torch.manual_seed(1)  # the same sampling and stochastic depth
        targets = torchvision_targets(iscrowd)
        count = model.loss_count(images, targets)
        assert count.isfinite()
        return [loss.item() for loss in model(images, targets).values()]

    nothing = losses(None)
    assert losses(torch.tensor([0, 0])) == pytest.approx(nothing)
    assert losses(torch.tensor([False, False])) == pytest.approx(nothing)
    crowd = losses(torch.tensor([0, 1]))
    assert crowd != pytest.approx(nothing)
    assert losses(torch.tensor([False, True])) == pytest.approx(crowd)


@pytest.mark.parametrize("name", ["eff_spinenet_m0", "efficientdet_d0", "mobile_spinenet_49xs"])
def test_a_backbone_gives_levels_of_one_width(name: str) -> None:
    with torch.device("meta"):
        backbone = create_backbone(name)
        features = backbone(torch.zeros(2, 3, 97, 131))
    assert list(features) == NAMES
    for level, feature in zip(specs.OUTPUT_LEVELS, features.values(), strict=True):
        sides = (specs.level_side(97, level), specs.level_side(131, level))
        assert feature.shape == (2, backbone.out_channels, *sides)


def test_a_model_without_a_pyramid_gives_no_backbone() -> None:
    with pytest.raises(UserError, match="no feature pyramid"):
        create_backbone("mobilenetv3_small_ssdlite")
    with pytest.raises(UnknownName, match="detection"):
        create_backbone("efficientnet_b0")


@pytest.mark.parametrize("detector", [RetinaNet, FasterRCNN])
def test_a_backbone_trains_under_torchvisions_detectors(detector: type) -> None:
    torch.manual_seed(0)
    backbone = create_backbone("eff_spinenet_m0")
    anchors = AnchorGenerator(
        tuple((4 * 2**level,) for level in specs.OUTPUT_LEVELS), ((0.5, 1.0, 2.0),) * 5
    )
    options: dict[str, Any] = {"min_size": 128, "max_size": 128}
    if detector is RetinaNet:
        options["anchor_generator"] = anchors
    else:
        pool = MultiScaleRoIAlign(NAMES, output_size=7, sampling_ratio=2)
        options |= {"rpn_anchor_generator": anchors, "box_roi_pool": pool}
    model = detector(backbone, 91, **options).train()
    images = list(torch.rand(2, 3, SIDE, SIDE))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = model(images, torchvision_targets(torch.tensor([0, 0])))
    sum(losses.values(), torch.zeros(())).backward()
    optimizer.step()
    stem = backbone.backbone.stem[0].weight  # type: ignore[union-attr,index]
    assert all(loss.isfinite() for loss in losses.values())
    assert stem.grad.abs().sum() > 0
    with torch.no_grad():
        found = model.eval()(images)
    assert [set(one) for one in found] == [{"boxes", "scores", "labels"}] * 2


def state_names(name: str, task: str) -> str:
    """A digest of the names and shapes of all that a weights file of a model holds."""
    with torch.device("meta"):
        state = create_model(name, task).state_dict()
    lines = (f"{key} {list(value.shape)}" for key, value in sorted(state.items()))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def test_weights_files_of_every_model_keep_their_names_and_shapes() -> None:
    """A change here makes weights unreadable that people have trained."""
    pinned = json.loads((Path(__file__).parent / "golden" / "state_names.json").read_text())
    found = {
        f"{name} {task}": state_names(name, task)
        for name in list_models()
        for task in model_entry(name).image_sizes
    }
    assert found == pinned
