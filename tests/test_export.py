"""Exported models: ONNX Runtime gives what PyTorch gives, with and without this library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from effspinenet_lib import cli
from effspinenet_lib.cli.train import detections
from effspinenet_lib.data import DataConfig, open_dataset
from effspinenet_lib.data.augment import fit_image
from effspinenet_lib.errors import UserError
from effspinenet_lib.models.base import TaskModel
from effspinenet_lib.models.weights import save_weights
from effspinenet_lib.models.zoo import create_model
from effspinenet_lib.training.deploy import OnnxDetector, prepare
from effspinenet_lib.training.export import export_onnx

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")

SIDE, PICTURES = 128, 10
SCENES = DataConfig("shapescenes", train_images=1, eval_images=PICTURES, image_size=200)


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Ten scenes, cut to unlike shapes."""
    dataset = open_dataset(SCENES, "eval")
    return [dataset.load(n).image[: 200 - 7 * n, : 120 + 8 * n] for n in range(PICTURES)]


def varied(name: str, task: str, side: int, pictures: list[np.ndarray]) -> TaskModel:
    """A model whose norms know the pictures and whose detections have unlike scores."""
    torch.manual_seed(0)
    model = create_model(name, task, 5).train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
        if isinstance(layer, torch.nn.Conv2d) and layer.weight.std() < 1e-3:  # dense predictions
            torch.nn.init.normal_(layer.weight, std=0.05)
    if hasattr(model, "class_head"):
        torch.nn.init.normal_(model.class_head.last_conv.weight, std=0.05)
        torch.nn.init.constant_(model.class_head.last_conv.bias, -2.0)
        torch.nn.init.normal_(model.box_head.last_conv.weight, std=0.02)
    with torch.no_grad():
        model.network(torch.cat([torch.from_numpy(prepare(p, side)[0]) for p in pictures]))
    return model.eval()


def run(path: Path, images: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path))
    outputs: list[np.ndarray] = session.run(None, {"images": images})
    return outputs


def assert_detections_agree(outputs: Any, expected: list[dict[str, torch.Tensor]]) -> None:
    """The same boxes to 1e-3 pixels; scores that differ by rounding may change places."""
    for boxes, scores, labels, one in zip(*outputs, expected, strict=True):
        count = len(one["scores"])
        assert 0 < count <= 100
        assert (scores > 0).sum() == count
        np.testing.assert_allclose(scores[:count], one["scores"], atol=1e-4)
        for box, score, label in zip(one["boxes"], one["scores"], one["labels"], strict=True):
            near = (np.abs(scores - float(score)) < 1e-4) & (labels == int(label))
            assert np.abs(boxes[near] - box.numpy()).max(1).min() < 1e-3


@pytest.fixture(scope="module")
def exported(
    pictures: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TaskModel, Path]:
    """A detector, and the file that the command writes of it."""
    folder = tmp_path_factory.mktemp("exported")
    model = varied("eff_spinenet_m0", "detection", SIDE, pictures)
    weights, path = folder / "model.safetensors", folder / "model.onnx"
    facts = {"model": "eff_spinenet_m0", "task": "detection", "num_classes": 5, "options": {}}
    categories = [{"id": n, "name": f"class {n}"} for n in range(5)]
    facts |= {"categories": categories, "image_size": SIDE}
    save_weights(weights, model.state_dict(), facts)
    command = ["export", "--weights", str(weights), "--format", "onnx", "--output", str(path)]
    result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return model, path


def test_onnx_runtime_gives_the_detections_of_pytorch(
    exported: tuple[TaskModel, Path], pictures: list[np.ndarray]
) -> None:
    """Of ten pictures at once, and of one: boxes to a thousandth of a pixel."""
    model, path = exported
    images = np.concatenate([prepare(picture, SIDE)[0] for picture in pictures])
    with torch.no_grad():
        expected = model(torch.from_numpy(images))
    assert_detections_agree(run(path, images), expected)
    assert_detections_agree(run(path, images[3:4]), expected[3:4])


def test_a_picture_is_prepared_without_torch_as_with_it(pictures: list[np.ndarray]) -> None:
    level = 1 / 255 / 0.224
    for picture in (*pictures, np.full((3, 400, 3), 9, np.uint8)):
        images, scale = prepare(picture, SIDE)
        expected, scales = fit_image(picture, SIDE)
        assert (scale, scale) == scales
        np.testing.assert_allclose(images[0], expected, atol=2.1 * level)
        assert np.mean(np.abs(images[0] - expected.numpy()) > 0.1 * level) < 0.1


def test_a_picture_goes_through_onnx_runtime_without_torch(
    exported: tuple[TaskModel, Path], pictures: list[np.ndarray]
) -> None:
    model, path = exported
    detector = OnnxDetector(path)
    found = detector(pictures[1], threshold=0.0)
    (expected,) = detections(model, pictures[1:2], SIDE)
    assert found[0]["category"] == f"class {expected['labels'][0]}"
    np.testing.assert_allclose(found[0]["box"], expected["boxes"][0], atol=0.5)
    assert found[0]["score"] == pytest.approx(float(expected["scores"][0]), abs=0.02)
    best = found[0]["score"]
    assert detector(pictures[1], threshold=best) == found[:1]


def test_candidates_of_each_class_apart(pictures: list[np.ndarray], tmp_path: Path) -> None:
    model = varied("mobilenetv3_small_ssdlite", "detection", 96, pictures)
    path = export_onnx(model, 96, tmp_path / "model.onnx")
    images = np.concatenate([prepare(picture, 96)[0] for picture in pictures[:3]])
    with torch.no_grad():
        assert_detections_agree(run(path, images), model(torch.from_numpy(images)))


@pytest.mark.parametrize(("task", "decode"), [("classification", False), ("segmentation", True)])
def test_other_tasks(task: str, decode: bool, pictures: list[np.ndarray], tmp_path: Path) -> None:
    model = varied("eff_spinenet_m0", task, 64, pictures)
    path = export_onnx(model, 64, tmp_path / "model.onnx", decode)
    images = np.concatenate([prepare(picture, 64)[0] for picture in pictures[:3]])
    with torch.no_grad():
        given = torch.from_numpy(images)
        if decode:
            expected = torch.stack([one["logits"] for one in model(given)])
        else:
            expected = model.network(given)
    (found,) = run(path, images)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx", "--output", "m.pt2"], "a file of the format onnx ends in .onnx"),
        (["--output", "m.onnx"], "a file of the format torch ends in .pt2"),
        (["--format", "onxx", "--output", "m.onnx"], "did you mean onnx"),
    ],
)
def test_the_suffix_fits_the_format(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.app, ["export", "--weights", "none", *arguments])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


def test_instances_have_no_onnx(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ONNX has no fixed shapes .* --format torch"):
        export_onnx(create_model("eff_spinenet_m0", "instances", 5), 64, tmp_path / "m.onnx")
