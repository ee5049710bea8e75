"""`effspinenet evaluate` with converted weights: on COCO images, by COCO's ids, and interrupted."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import REPOSITORY, shown
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.nn import functional
from typer.testing import CliRunner

from benchmarks.seeded import load_seeded
from effspinenet_lib import experiments
from effspinenet_lib.cli import app
from effspinenet_lib.models.released import COCO_NAMES, UNUSED, create_released, released_metadata
from effspinenet_lib.models.weights import save_weights
from effspinenet_lib.results import validate, write_datapackage

NAME, SIZE = "mobile_spinenet_49xs", 256
SEED = 2010
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seeded weights in a file as `convert` writes it."""
    model = create_released(NAME)
    load_seeded(model, SEED)
    path = tmp_path_factory.mktemp("weights") / "released.safetensors"
    save_weights(path, model.state_dict(), released_metadata(NAME, "ckpt-1"))
    return path


def arguments(weights: Path, data: Path, output: Path, *more: str) -> list[str]:
    named = ["evaluate", "--model", NAME, "--weights", str(weights), "--data", str(data)]
    files = ["--output", str(output), "--record", str(output / "evaluations.csv")]
    return [*named, *files, "--images", "8", *more]


@pytest.fixture(scope="module")
def evaluated(weights: Path, tiny_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation over 8 real images with two loading processes."""
    output = tmp_path_factory.mktemp("evaluated")
    command = arguments(weights, tiny_coco, output, "--workers", "2")
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return output


def predictions(folder: Path) -> list[dict]:
    return json.loads((folder / "predictions.json").read_text())


def test_predictions_are_the_models_by_hand(evaluated: Path, tiny_coco: Path) -> None:
    """Resized, normalised and mapped back here, without the library's own preprocessing."""
    model = create_released(NAME).eval()
    load_seeded(model, SEED)
    truth = COCO(tiny_coco / "annotations" / "instances_val2017.json")
    found = predictions(evaluated)
    image_ids = sorted(truth.getImgIds())[:8]
    assert {record["image_id"] for record in found} == set(image_ids)
    for image_id in image_ids[:4]:
        with Image.open(tiny_coco / "val2017" / truth.imgs[image_id]["file_name"]) as picture:
            pixels = (np.asarray(picture.convert("RGB")) / 255 - MEAN) / STD
        height, width = pixels.shape[:2]
        rows, columns = (round(side * SIZE / max(height, width)) for side in (height, width))
        image = torch.zeros(1, 3, SIZE, SIZE)
        image[:, :, :rows, :columns] = functional.interpolate(
            torch.from_numpy(pixels).permute(2, 0, 1)[None].float(),
            (rows, columns),
            mode="bilinear",
        )
        with torch.inference_mode():
            (output,) = model(image)
        real = [COCO_NAMES[label + 1] != UNUSED for label in output["labels"].tolist()]
        expected = output["boxes"][real].numpy()
        expected *= np.array([width / columns, height / rows] * 2)
        records = [record for record in found if record["image_id"] == image_id]
        assert len(records) == len(expected) > 10
        labels = [int(label) + 1 for label in output["labels"][real]]
        assert [record["category_id"] for record in records] == labels
        boxes = np.array([record["bbox"] for record in records])
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(boxes, expected, atol=0.02)


def test_boxes_may_reach_over_the_image_as_in_the_released_code(
    evaluated: Path, tiny_coco: Path
) -> None:
    truth = COCO(tiny_coco / "annotations" / "instances_val2017.json")
    over = [
        x + width > truth.imgs[r["image_id"]]["width"] + 1
        or y + height > truth.imgs[r["image_id"]]["height"] + 1
        for r in predictions(evaluated)
        for x, y, width, height in [r["bbox"]]
    ]
    assert any(over)


def test_the_record_has_pycocotools_metrics(
    evaluated: Path, weights: Path, tiny_coco: Path
) -> None:
    with open(evaluated / "evaluations.csv", newline="") as file:
        rows = {row["metric"]: row for row in csv.DictReader(file)}
    truth = COCO(tiny_coco / "annotations" / "instances_val2017.json")
    evaluation = COCOeval(truth, truth.loadRes(str(evaluated / "predictions.json")), "bbox")
    evaluation.params.imgIds = sorted(truth.getImgIds())[:8]
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert len(rows) == 12
    for metric, value in zip(("AP", "AP50", "AP75"), evaluation.stats, strict=False):
        assert float(rows[metric]["value"]) == pytest.approx(100 * value, abs=1e-6)
    first = rows["AP"]
    assert (first["model"], first["images"], first["image_size"]) == (NAME, "8", str(SIZE))
    assert first["origin"].startswith("TensorFlow Model Garden")
    assert first["published"] == ""  # nobody published one for this model


def test_the_books_table_shows_what_was_evaluated(
    evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "default_results_dir", lambda: tmp_path)
    shutil.copytree(REPOSITORY / "results/parity", tmp_path / "parity")
    assert "Converted weights on COCO: not run" in shown("book/released.md", {})
    shutil.copy(evaluated / "evaluations.csv", tmp_path / "parity")
    text = shown("book/released.md", {})
    assert "not run" not in text
    assert "AP50" in text
    write_datapackage(tmp_path)
    assert validate(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--model", "spinenet_49"), "is of model mobile_spinenet_49xs, not of spinenet_49"),
        (("--weights", "absent.safetensors"), "no such weights file"),
    ],
)
def test_what_does_not_fit_is_one_line(
    weights: Path, tiny_coco: Path, tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    result = CliRunner().invoke(app, arguments(weights, tiny_coco, tmp_path, *change))
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
