"""The command line: what it prints, its exit codes, and that errors are one line."""

import csv
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from pycocotools.coco import COCO

from effspinenet_lib import __version__, cli, experiments, publish
from effspinenet_lib.cli.console import draw
from effspinenet_lib.cli.train import adjust_recipe, detections
from effspinenet_lib.errors import (
    PREEMPTED_EXIT,
    CheckpointError,
    DataError,
    TrainingError,
    UserError,
)
from effspinenet_lib.results import read_table
from effspinenet_lib.training.recipes import get_recipe

COMMANDS = tuple(typer.main.get_command(cli.app).commands)
NESTED = tuple(
    (name, inner)
    for name, command in typer.main.get_command(cli.app).commands.items()
    for inner in getattr(command, "commands", ())
)
TINY = ("--image-size", "64", "--batch-size", "2")


class Result:
    """Exit code and output of a command."""

    def __init__(self, code, output):
        self.code, self.out, self.err = code, output.out, output.err

    @property
    def error(self):
        """The one line on stderr that says what was wrong."""
        lines = [line for line in self.err.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        return lines[0]


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments):
        monkeypatch.setattr(sys, "argv", ["effspinenet", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return Result(stop.value.code or 0, capsys.readouterr())

    return run_command


def table_rows(text):
    """The cells of the tables that a command printed."""
    lines = [line for line in text.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """ShapeScenes as a COCO folder: 3 images to train on, 2 to evaluate on."""
    folder = tmp_path_factory.mktemp("scenes")
    command = ["data", "make", "shapescenes", str(folder), "--train-images", "3"]
    cli.app([*command, "--eval-images", "2", "--image-size", "64"], standalone_mode=False)
    return folder


@pytest.fixture(scope="module")
def weights(scenes, tmp_path_factory):
    """Weights that two steps of training left."""
    runs = tmp_path_factory.mktemp("runs")
    command = ["train", "--data", str(scenes), "--output", str(runs), "--steps", "2", *TINY]
    cli.app(command, standalone_mode=False)
    return next(runs.glob("*/model.safetensors"))


HELP = """
import sys
from effspinenet_lib.cli import app
for command in (*{commands!r}, ()):
    try:
        app([*command, "--help"], prog_name="effspinenet")
    except SystemExit:
        pass
print(sorted({{"torch", "pandas", "matplotlib", "numpy", "PIL", "accelerate"}} & set(sys.modules)))
"""


def test_help_names_every_command_and_loads_nothing_heavy():
    commands = [*((name,) for name in COMMANDS), *NESTED]
    program = [sys.executable, "-c", HELP.format(commands=commands)]
    output = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
    for command in commands:
        assert f"Usage: effspinenet {' '.join(command)} " in output
    for name in ("models", "cost", "wiring", "convert", "train", "evaluate", "detect", "export"):
        assert f"│ {name} " in output
    for name in ("reproduce", "plan", "book", "results", "data", "search"):
        assert f"│ {name} " in output


@pytest.mark.parametrize(
    ("rank", "speaks"), [("0", True), ("1", False)], ids=["first process", "another process"]
)
def test_of_several_processes_one_speaks_and_all_say_errors(rank, speaks):
    code = (
        "import logging, sys, warnings\n"
        "from effspinenet_lib.cli import main\n"
        "from effspinenet_lib.cli.console import set_up_messages\n"
        "set_up_messages()\n"
        "logging.getLogger('effspinenet_lib').info('told')\n"
        "warnings.warn('warned')\n"
        "sys.argv = ['effspinenet', 'reproduce', 'table-08', '--max-steps', '3']\n"
        "print('printed')\n"
        "main()"
    )
    environment = {**os.environ, "RANK": rank}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert ("printed" in done.stdout) == speaks
    assert ("told" in done.stderr) == ("warning: warned" in done.stderr) == speaks
    assert done.stderr.splitlines()[-1] == "error: --max-steps needs --row"


def test_a_disk_that_is_full_from_the_start_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "effspinenet_lib", "train", "--data", "shapescenes"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )
    assert done.returncode == UserError.exit_code
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_version_is_the_packages(run):
    assert run("--version").out == f"effspinenet {__version__}\n"


def test_models_lists_each_model_with_its_tasks_input_sizes_and_tables(run):
    rows = {row[0]: row for row in table_rows(run("models").out)}
    # Tables 2 and 10, section 5.3; M0 has no row in Tables 6 and 10
    assert rows["eff_spinenet_m0"][1:] == ["256", "256", "224", "512", "table-02, table-07"]
    assert rows["eff_spinenet_d2"][1:5] == ["768", "768", "256", "512"]
    assert rows["sp_efficientnet_m0"][5] == "not in the paper"


COST = re.compile(
    r"(.*) B multiply-adds, (.*) B by the authors' count, (.*) M parameters at (.*)\n"
)


def test_cost_prints_the_papers_columns_for_d0(run):
    counted = COST.fullmatch(run("cost", "eff_spinenet_d0").out).groups()
    assert round(float(counted[1]), 1) == 2.5  # Table 3
    assert counted[2:] == ("3.75", "512x512")  # of the authors' code; Table 3 prints 3.6


def test_cost_takes_model_options_and_an_image_size(run):
    plain = run("cost", "eff_spinenet_d0", "--option", "space_to_depth=false").out
    assert round(float(COST.fullmatch(plain)[3]), 1) == 3.3  # Table 9, model 1
    small = run("cost", "eff_spinenet_m0", "--image-size", "128", "--num-classes", "3").out
    assert COST.fullmatch(small)[4] == "128x128"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("cost eff_spinenet_d00", 2, "unknown model 'eff_spinenet_d00'; did you mean eff_spin"),
        ("cost eff_spinenet_m0 --task detektion", 2, "unknown task 'detektion'; did you mean det"),
        ("cost eff_spinenet_m0 --option activatoin=relu", 2, "did you mean activation"),
        ("cost eff_spinenet_m0 --option activation", 2, "not of the form key=value"),
        ("cost eff_spinenet_m0 --option activation=[", 2, "cannot be read"),
        ("cost eff_spinenet_m0 --option activation=[relu]", 2, "is not one word or number"),
        ("cost eff_spinenet_m0 --option task=x", 2, "unknown model option 'task'"),
        ("cost eff_spinenet_m0 --option stochastic_depth=5", 2, "from 0 to below 1"),
        ("cost eff_spinenet_m0 --image-size 32", 2, "at least 64"),
        ("train --data shapescenes --model resnet51", 2, "unknown model 'resnet51'"),
        (
            "train --data shapescenes --recipe papier",
            2,
            "unknown recipe 'papier'; did you mean pap",
        ),
        ("train --data no_such_folder", 2, "no_such_folder: no such folder"),
        ("reproduce table-8", 2, "unknown item 'table-8'; did you mean table-08"),
        ("reproduce table-08 --profile smok", 2, "unknown profile 'smok'; did you mean smoke?"),
        ("data make shapescene out", 2, "did you mean shapescenes"),
        ("data check no_such_folder", 3, "no_such_folder: no such folder"),
        ("evaluate --weights no.safetensors --data shapescenes", 4, "no such weights file"),
        ("detect picture.png --weights no.safetensors", 4, "no such weights file"),
        ("results validate --results-dir no_such_folder", 2, "no_such_folder: no such folder"),
    ],
)
def test_a_wrong_name_or_file_is_one_line_and_an_exit_code(
    run, tmp_path, monkeypatch, command, code, message
):
    monkeypatch.chdir(tmp_path)
    result = run(*command.split())
    assert message in result.error
    assert result.code == code
    assert result.out == ""


@pytest.mark.parametrize("command", ["cots", "train", "cost eff_spinenet_m0 --imagesize 64"])
def test_a_wrong_command_line_is_exit_code_2(run, command):
    result = run(*command.split())
    assert result.code == 2
    assert "Traceback" not in result.err


def test_any_command_that_is_told_to_stop_says_that_it_goes_on(run, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    told = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr(publish, "build_book", told)
    result = run("book")
    assert result.code == PREEMPTED_EXIT
    assert result.error == "error: stopped by SIGTERM; the same command resumes"
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_recipe_is_scaled_to_the_batch_that_is_given():
    recipe = get_recipe("paper_search_trial")
    changed = adjust_recipe(recipe, None, 4, None)
    assert changed == recipe.scale_to_batch(4)
    assert changed.scaled_from_batch == 256
    assert changed.learning_rate == pytest.approx(0.28 * 4 / 256)
    few = adjust_recipe(recipe, 10, 4, 0.5)
    assert (few.steps, few.batch_size, few.learning_rate) == (10, 4, 0.5)


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (UserError("what, where"), 2),
        (DataError("what, where"), 3),
        (CheckpointError("what, where"), 4),
        (TrainingError("what, where"), 5),
    ],
)
def test_each_kind_of_error_has_its_exit_code(run, monkeypatch, raised, code):
    def fail(**_):
        raise raised

    monkeypatch.setattr(publish, "build_book", fail)
    result = run("book")
    assert result.error == "error: what, where"
    assert result.code == code


def test_an_interruption_is_130_without_a_traceback(run, monkeypatch):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(publish, "build_book", interrupt)
    result = run("book")
    assert result.code == 130
    assert result.err == "interrupted; the same command resumes\n"


def test_made_scenes_are_a_coco_folder_and_the_same_bytes_for_a_seed(run, scenes, tmp_path):
    coco = COCO(scenes / "annotations" / "instances_train.json")
    assert len(coco.imgs) == 3
    size = ("--train-images", 3, "--eval-images", 2, "--image-size", 64)
    assert run("data", "make", "shapescenes", tmp_path / "same", *size).code == 0
    assert run("data", "make", "shapescenes", tmp_path / "other", *size, "--seed", 1).code == 0
    names = [path.relative_to(scenes) for path in sorted(scenes.rglob("*.*"))]
    assert len(names) == 7
    for name in names:
        assert (tmp_path / "same" / name).read_bytes() == (scenes / name).read_bytes()
    first = Path("train/000000.png")
    assert (tmp_path / "other" / first).read_bytes() != (scenes / first).read_bytes()


def test_data_check_counts_what_the_annotations_hold(run, scenes):
    result = run("data", "check", scenes)
    assert result.code == 0
    expected = []
    for split in ("train", "val"):
        content = json.loads((scenes / "annotations" / f"instances_{split}.json").read_text())
        expected.append(sum(not record["iscrowd"] for record in content["annotations"]))
    assert [int(row[-1]) for row in table_rows(result.out) if row[0] == "all"] == expected


def test_data_check_names_a_truncated_picture_and_a_broken_split(run, scenes, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(scenes, folder)
    picture = folder / "train" / "000001.png"
    picture.write_bytes(picture.read_bytes()[:200])
    (folder / "annotations" / "instances_val.json").write_text('{"images": [')
    result = run("data", "check", folder)
    assert result.code == 1
    problems = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    assert [line.split(":")[0] for line in problems] == ["problem", "problem"]
    assert str(picture) in problems[0]
    assert "instances_val.json: is not JSON" in problems[1]


def test_data_check_warns_of_the_degenerate_boxes_of_a_real_set(run, bccd):
    result = run("data", "check", bccd, "--no-pictures")
    assert result.code == 0
    assert "dropped 2 degenerate boxes" in result.err
    assert "train: 205 images" in result.out


def test_a_sheet_holds_as_many_pictures_as_asked(run, scenes, tmp_path):
    output = tmp_path / "new" / "sheet.png"
    options = ("--data", scenes, "--count", 3, "--columns", 2)
    assert "3 images" in run("data", "sheet", output, *options).out
    drawn = np.asarray(Image.open(output))
    assert (drawn[: len(drawn) // 2, : drawn.shape[1] // 2] != 255).any()
    assert (drawn[len(drawn) // 2 + 8 :, drawn.shape[1] // 2 + 8 :] == 255).all()


def test_a_picture_of_an_unknown_format_is_refused(run, scenes, tmp_path):
    result = run("data", "sheet", tmp_path / "sheet.text", "--data", scenes)
    assert "unknown picture format '.text'" in result.error
    assert list(tmp_path.iterdir()) == []


def test_training_leaves_weights_that_evaluate_to_the_same_metrics(run, scenes, weights, tmp_path):
    runs = weights.parent.parent
    before = weights.stat().st_mtime_ns
    trained = run("train", "--data", scenes, "--output", runs, "--steps", 2, *TINY)
    assert trained.code == 0
    assert str(weights) in trained.out
    assert f"Threads: {torch.get_num_threads()} " in trained.out
    assert "Device:  cpu\n" in trained.out
    assert re.search(r"Recipe:  \w+, [\d,]+ steps of \d+ images, sgd, learning rate", trained.out)
    assert weights.stat().st_mtime_ns == before, "a finished run is not trained again"
    (row,) = read_table(runs / "runs.csv", "run").to_dict("records")
    assert (row["run"], row["state"], row["steps"]) == (weights.parent.name, "finished", 2)
    output = tmp_path / "found"
    evaluated = run("evaluate", "--weights", weights, "--data", scenes, "--output", output)
    assert len(table_rows(evaluated.out)) == 12
    assert table_rows(evaluated.out) == table_rows(trained.out)
    records = json.loads((output / "predictions.json").read_text())
    assert all({"image_id", "category_id", "bbox", "score"} == set(record) for record in records)
    assert len(json.loads((output / "metrics.json").read_text())) == 12


@pytest.mark.parametrize(
    ("task", "metrics"), [("instances", 24), ("classification", 2), ("segmentation", 1)]
)
def test_the_other_tasks_train_evaluate_and_export(run, scenes, tmp_path, task, metrics):
    # Norms over fewer values than 8, and longer steps, give weights that are not finite.
    size = ("--image-size", 64, "--batch-size", 8, "--learning-rate", 1e-4)
    options = ("--task", task, "--steps", 1, "--output", tmp_path, *size)
    trained = run("train", "--data", scenes, *options)
    assert trained.code == 0, trained.error
    assert len(table_rows(trained.out)) == metrics
    (weights,) = tmp_path.glob("*/model.safetensors")
    evaluated = run("evaluate", "--weights", weights, "--data", scenes)
    assert table_rows(evaluated.out) == table_rows(trained.out)
    program = tmp_path / "new" / "model.pt2"
    exported = run("export", "--weights", weights, "--output", program)
    assert exported.code == 0, exported.error
    assert task in exported.out
    assert program.stat().st_size > 100_000
    picture = scenes / "val" / "000000.png"
    detected = run("detect", picture, "--weights", weights, "--output", tmp_path / "found.png")
    assert detected.code == (0 if task == "instances" else 2)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_wiring_draws_every_scale_permuted_model(run, tmp_path, suffix):
    for name in ("eff_spinenet_d1", "spinenet_49"):
        output = tmp_path / "new" / f"{name}.{suffix}"
        assert run("wiring", name, output).code == 0
        head = output.read_bytes()[:400]
        assert (b"<svg" in head) if suffix == "svg" else head.startswith(b"\x89PNG")
    assert "end its name in .svg or .png" in run("wiring", name, tmp_path / "x.doc").error
    assert "spinenet_49" in run("wiring", "spinenet_94", tmp_path / "x.svg").error


def labels(picture):
    """The texts of an SVG, which stand in its comments."""
    return re.findall(r"<!-- (.+?) -->", picture.read_text())


def test_wiring_draws_a_distribution_from_a_file(run, tmp_path):
    path, output = tmp_path / "table_1.json", tmp_path / "wiring.svg"
    assert run("search", "export", path, "--method", "paper", "--results-dir", tmp_path).code == 0
    assert run("wiring", path, output).code == 0
    drawn = labels(output)
    assert run("wiring", "eff_spinenet_m0", output).code == 0
    assert drawn == labels(output)
    assert run("wiring", "eff_spinenet_d0", output).code == 0
    assert drawn != labels(output)
    missing = run("wiring", tmp_path / "none.json", output)
    assert missing.code == 3
    assert "none.json: no such file" in missing.error


def test_overfitting_evaluates_on_the_images_that_it_trains_on(run, scenes, tmp_path):
    options = ("--steps", 1, "--overfit", 2, *TINY)
    assert run("train", "--data", scenes, "--output", tmp_path, *options).code == 0
    config = json.loads(next(tmp_path.glob("*/config.json")).read_text())
    assert config["data"]["eval_split"] == config["data"]["train_split"] == "train"
    assert config["data"]["eval_images"] == config["data"]["train_images"] == 2
    assert config["recipe"]["scale_jitter"] == [1.0, 1.0]
    assert config["recipe"]["flip_probability"] == 0


def test_an_output_folder_that_cannot_be_written_is_an_error(run, scenes, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("train", "--data", scenes, "--output", tmp_path / "file" / "runs", *TINY)
    assert f"cannot write in {tmp_path / 'file' / 'runs'}" in result.error
    assert result.code == 2


def test_weights_are_not_evaluated_on_other_categories(run, weights, scenes, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(scenes, folder)
    path = folder / "annotations" / "instances_val.json"
    path.write_text(path.read_text().replace("plain disc", "full moon"))
    result = run("evaluate", "--weights", weights, "--data", folder)
    assert f"has objects of other categories than the weights {weights}" in result.error
    assert "'full moon'" in result.error
    assert result.code == 3


def test_weights_that_are_cut_short_are_an_error(run, weights, scenes, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:5000])
    result = run("evaluate", "--weights", cut, "--data", scenes)
    assert str(cut) in result.error
    assert result.code == 4


def test_detect_writes_the_picture_with_its_boxes(run, weights, scenes, tmp_path):
    output = tmp_path / "found.png"
    picture = scenes / "val" / "000000.png"
    result = run("detect", picture, "--weights", weights, "--output", output)
    assert result.code == 0
    assert f"wrote {output}" in result.out
    assert Image.open(output).size[0] % Image.open(picture).size[0] == 0


def test_detect_names_a_picture_that_cannot_be_decoded(run, weights, scenes, tmp_path):
    cut = tmp_path / "cut.png"
    cut.write_bytes((scenes / "val" / "000000.png").read_bytes()[:200])
    result = run("detect", cut, "--weights", weights)
    assert str(cut) in result.error
    assert result.code == 3


def test_detect_takes_folders_and_writes_what_it_found(run, weights, scenes, tmp_path):
    shutil.copytree(scenes / "val", tmp_path / "pictures")
    paths = (tmp_path / "pictures", scenes / "val" / "000000.png")
    options = ("--output", tmp_path / "found", "--threshold", 0)
    files = ("--json", tmp_path / "found.json", "--csv", tmp_path / "found.csv")
    result = run("detect", *paths, "--weights", weights, *options, *files)
    assert result.code == 0, result.error
    drawn = len(list((tmp_path / "pictures").iterdir())) + 1
    assert len(list((tmp_path / "found").glob("*.png"))) == drawn
    records = json.loads((tmp_path / "found.json").read_text())
    rows = list(csv.DictReader((tmp_path / "found.csv").read_text().splitlines()))
    assert [row["class"] for row in rows] == [record["class"] for record in records]
    assert f"{len(records)} objects" in result.out
    assert f"in {drawn} pictures" in result.out


def test_a_finished_run_says_when_it_was_trained(run, scenes, weights):
    options = ("--output", weights.parent.parent, "--steps", 2, *TINY)
    result = run("train", "--data", scenes, *options)
    assert re.search(r"already finished on \d{4}-.*not trained again \(--force\)", result.out)


def test_train_refuses_what_check_refuses_with_all_faults(run, scenes, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(scenes, folder)
    path = folder / "annotations" / "instances_train.json"
    truth = json.loads(path.read_text())
    for record in truth["annotations"][:2]:
        record["bbox"] = None
    path.write_text(json.dumps(truth))
    result = run("train", "--data", folder, "--output", tmp_path / "runs", "--steps", 2, *TINY)
    assert result.code == 3
    (report,) = (tmp_path / "runs").glob("*/faults.csv")
    problems = [row["problem"] for row in csv.DictReader(report.read_text().splitlines())]
    assert len(problems) == 2
    assert f"{problems[0]} (2 faults; all in {report})" in result.err
    checked = run("data", "check", folder, "--report", tmp_path / "report.csv")
    assert all(f"problem: train: {problem}" in checked.err for problem in problems)


class FixedDetector(torch.nn.Module):
    """Finds one box, at the same place of the input in every image."""

    def __init__(self, box):
        super().__init__()
        self.box, self.seen = torch.tensor([box]), None

    def forward(self, images, extents):
        self.seen, self.extents = images, extents
        found = {"boxes": self.box, "scores": torch.ones(1), "labels": torch.zeros(1).long()}
        return [found] * len(images)


def test_detections_are_in_pixels_of_the_picture():
    # A picture of 100 x 200 (height, width) on an input of 64: scale 0.32, rows 32 and up empty.
    picture = np.full((100, 200, 3), 255, np.uint8)
    model = FixedDetector([16.0, 8.0, 32.0, 64.0])
    wide, tall = detections(model, [picture, picture.transpose(1, 0, 2)], 64)
    assert model.extents == [(32, 64), (64, 32)]
    assert wide["boxes"].tolist() == [[50.0, 25.0, 100.0, 100.0]]
    assert tall["boxes"].tolist() == [[50.0, 25.0, 100.0, 200.0]]
    assert model.seen.shape == (2, 3, 64, 64)
    assert (model.seen[0, :, 32:] == 0).all()
    assert (model.seen[0, :, :32] > 0).all()
    assert (model.seen[1, :, :, 32:] == 0).all()


def pixels_of(picture):
    return picture.permute(1, 2, 0).numpy()


def test_boxes_are_drawn_where_they_are_and_in_the_colour_of_their_class():
    black = np.zeros((480, 640, 3), np.uint8)
    boxes = torch.tensor([[100.0, 200, 300, 400], [400, 200, 600, 400]])
    drawn = pixels_of(draw(black, boxes, [1, 2], ["x", "y"]))
    assert drawn.shape == black.shape
    edges = [tuple(drawn[300, column]) for column in (100, 300, 400, 600)]
    assert edges[0] == edges[1] != edges[2] == edges[3] != (0, 0, 0)
    assert tuple(drawn[400, 200]) == edges[0]
    assert not drawn[240:380, 120:280].any()
    assert not drawn[:, 310:390].any()
    assert not drawn[410:].any()


def test_a_small_picture_is_enlarged_with_its_boxes_and_masks():
    pixels = np.zeros((48, 48, 3), np.uint8)
    mask = torch.zeros(1, 48, 48, dtype=torch.bool)
    mask[0, 12:18, 12:18] = True
    drawn = pixels_of(draw(pixels, torch.tensor([[10.0, 10, 20, 20]]), [0], [""], mask))
    assert drawn.shape == (480, 480, 3)
    assert drawn[200, 150].any()
    assert drawn[150, 150].any()
    assert not drawn[190, 190].any()
    nothing = draw(pixels, torch.zeros(0, 4), [], [])
    assert (pixels_of(nothing) == pixels).all()


def test_the_options_of_a_group_reach_its_commands(run, repository, tmp_path, monkeypatch):
    """`results --results-dir D costs` must not touch the checkout's files."""
    before = {path: path.stat().st_mtime_ns for path in (repository / "results").rglob("*.*")}
    folder = tmp_path / "there"
    checked = run("results", "--results-dir", folder, "validate")
    assert checked.error == f"error: {folder}: no such folder; give the results with --results-dir"
    folder.mkdir()
    inner = run("results", "--results-dir", folder, "validate", "--results-dir", tmp_path / "inner")
    assert "inner: no such folder" in inner.error
    exported = run("search", "--results-dir", folder, "export", tmp_path / "found.json")
    assert exported.code == 2, "no trials are recorded there"
    monkeypatch.setattr("effspinenet_lib.experiments.cost_table.cost_table", lambda: [])
    assert run("results", "--results-dir", folder, "costs").code == 0
    assert (folder / "cost" / "costs.csv").exists()
    command = ("search", "--results-dir", folder, "space", "--samples", 1000)
    assert run(*command).code == 0
    assert (folder / "search" / "space.csv").exists()
    unknown = run("search", "--trials", 3, "export", tmp_path / "found.json")
    assert unknown.error == "error: `effspinenet search export` has no --trials"
    after = {path: path.stat().st_mtime_ns for path in (repository / "results").rglob("*.*")}
    assert after == before


def test_results_lists_every_item_and_validates_what_is_committed(run, repository):
    listed = {row[0] for row in table_rows(run("results").out)}
    assert set(experiments.ITEMS) <= listed
    result = run("results", "validate", "--results-dir", repository / "results")
    assert result.err == ""
    assert result.code == 0


def test_results_validate_names_the_file_of_a_broken_row(run, repository, tmp_path):
    folder = tmp_path / "results"
    for name in ("paper", "datapackage.json"):
        source = repository / "results" / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder)
    path = folder / "paper" / "table-08.csv"
    path.write_text(path.read_text().replace("table-08", "table-8", 1))
    result = run("results", "validate", "--results-dir", folder)
    assert result.code == 1
    assert f"problem: {path}: line 2: column item" in result.err


def test_reproduce_all_runs_each_item_that_needs_runs_once(run, monkeypatch, tmp_path):
    asked = []

    def record(name, parameters, micro_batch):
        asked.append(
            (name, parameters.profile.name, parameters.seeds, parameters.force, micro_batch)
        )

    monkeypatch.setattr(experiments, "reproduce", record)
    options = ("--results-dir", tmp_path, "--seeds", "3,4", "--force", "--micro-batch", 5)
    result = run("reproduce", "table-08", "all", *options)
    assert result.code == 0
    with_rows = [item.id for item in experiments.ITEMS.values() if item.notebook and item.rows]
    assert sorted(name for name, *_ in asked) == sorted(with_rows)
    assert {tuple(rest) for _, *rest in asked} == {("smoke", (3, 4), True, 5)}
    listed = [row[0] for row in table_rows(result.out)]
    rebuilt = [item.id for item in experiments.ITEMS.values() if item.notebook]
    assert sorted(listed) == sorted(rebuilt)


def test_book_says_where_it_is(run, monkeypatch, tmp_path):
    given = {}

    def build(**arguments):
        given.update(arguments)
        return tmp_path / "html" / "index.html"

    monkeypatch.setattr(publish, "build_book", build)
    result = run("book", "--profile", "proxy", "--output", tmp_path)
    assert result.out == f"Book: {tmp_path / 'html' / 'index.html'}\n"
    assert (given["profile"], given["output"]) == ("proxy", tmp_path)
