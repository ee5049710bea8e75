"""One contract for every model and task: build, train a step, predict, save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from effspinenet_lib.errors import UnknownName, UserError
from effspinenet_lib.models import specs
from effspinenet_lib.models.base import TaskModel
from effspinenet_lib.models.zoo import (
    TASKS,
    create_model,
    default_image_size,
    known_options,
    list_models,
    model_entry,
)
from effspinenet_lib.training.checkpoint import create_from_weights, save_weights
from effspinenet_lib.training.export import export_model

SIDE, CLASSES = 64, 3
PAIRS = [(name, task) for name in list_models() for task in model_entry(name).image_sizes]


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
    whole = {
        "boxes": boxes,
        "labels": torch.tensor([2, 0]),
        "iscrowd": torch.zeros(2, dtype=torch.bool),
        "masks": masks,
    }
    if task == "detection":
        del whole["masks"]
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


@pytest.mark.parametrize("task", TASKS)
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
    spec = specs.ModelSpec("eff_spinenet_x", "eff_spinenet", "X")
    monkeypatch.setitem(specs.MODELS, spec.name, spec)
    assert list_models()["eff_spinenet_x"] == ()
    assert default_image_size("eff_spinenet_x") == 320
    for task in TASKS:
        model = create_model("eff_spinenet_x", task, CLASSES)
        sizes = [p.numel() for p in model.parameters()]
        smaller, larger = (create_model(f"eff_spinenet_{s}", task, CLASSES) for s in ("m1", "m2"))
        counts = [sum(p.numel() for p in m.parameters()) for m in (smaller, larger)]
        assert counts[0] < np.sum(sizes) < counts[1]


def test_a_task_that_a_model_is_not_made_for_is_refused() -> None:
    with pytest.raises(UnknownName, match=r"resnet50_fpn.*detection"):
        create_model("resnet50_fpn", "classification")
    with pytest.raises(UnknownName, match="task"):
        create_model("eff_spinenet_m0", "detecting")
    with pytest.raises(UserError, match="at least one class"):
        create_model("eff_spinenet_m0", num_classes=0)
    assert "stochastic_depth" in known_options("eff_spinenet_m0")
