"""`effspinenet evaluate`."""

from __future__ import annotations

from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effspinenet_lib.cli.console import print_metrics
from effspinenet_lib.cli.data import Data, EvalSplit, Workers, data_config
from effspinenet_lib.errors import CheckpointError, DataError
from effspinenet_lib.training.recipes import EVALUATION_BATCH

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from accelerate import Accelerator

    from effspinenet_lib.data import Dataset
    from effspinenet_lib.training.prediction_log import PredictionLog

FOLDER = Path("runs") / "evaluations"
PARTIAL = ".partial"  # how the names of logs end
KEY_DIGITS = 12  # as of a run's key
UNUSED = "unused "  # beginning of the name of a class that no data set has


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(evaluate)


def evaluate(
    weights: Annotated[
        Path, typer.Option(metavar="FILE", help="As `train` and `convert` write them.")
    ],
    data: Data,
    model: Annotated[
        str | None, typer.Option(help="Checked against the weights file, which knows its model.")
    ] = None,
    eval_split: EvalSplit = "val",
    images: Annotated[int | None, typer.Option(min=1, help="Use only the first so many.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="[default: as the model was trained]")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = EVALUATION_BATCH,
    workers: Workers = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="For predictions.json (COCO's result format) and metrics.json. "
            f"[default: a folder of the evaluation's own in {FOLDER}]",
        ),
    ] = None,
    record: Annotated[
        Path, typer.Option(metavar="FILE.csv", help="Where the metrics are added, a row each.")
    ] = FOLDER / "evaluations.csv",
) -> None:
    """Measure a model by the metrics of its task.

    Detection and instances: the 12 COCO metrics of boxes, and of masks; interrupted, the same
    command goes on. Classification: top-1 and top-5. Segmentation: mIOU. Under `torchrun` the
    processes share the images; to go on it takes as many of them as before.

    For example:

    - `effspinenet evaluate --weights runs/0123456789ab/model.safetensors --data my_pictures`
    - `effspinenet evaluate --model mobile_spinenet_49 --weights mobile.safetensors --data coco
      --workers 2`
    """
    from effspinenet_lib.data import open_dataset
    from effspinenet_lib.data.released import FITTED
    from effspinenet_lib.files import ensure_folder, write_json
    from effspinenet_lib.results.evaluations import add_evaluation
    from effspinenet_lib.training.accelerator import make_accelerator
    from effspinenet_lib.training.checkpoint import create_from_weights
    from effspinenet_lib.training.evaluate import Settings, write_predictions
    from effspinenet_lib.training.evaluate import evaluate as measure
    from effspinenet_lib.training.inference import inference_copy
    from effspinenet_lib.training.stopping import lost_processes

    accelerator = make_accelerator()
    network, facts = create_from_weights(weights)
    if model not in (None, facts["model"]):
        raise CheckpointError(f"{weights}: is of model {facts['model']}, not of {model}")
    task, size = facts["task"], image_size or facts["image_size"]
    source = data_config(data, eval_split=eval_split, images=images, image_size=size, task=task)
    dataset = open_dataset(source, "eval", task)
    settings = Settings(
        facts.get("preprocessing", FITTED), _category_ids(weights, facts["categories"], dataset)
    )
    digest = sha256(weights.read_bytes()).hexdigest()[:KEY_DIGITS]
    key = _key(digest, dataset, size)
    folder = ensure_folder(output or FOLDER / key)
    ensure_folder(record.parent)
    with lost_processes(), _log(folder, key, task, accelerator) as log:
        evaluation = measure(
            inference_copy(network.to(accelerator.device)),
            dataset,
            task,
            size,
            batch_size,
            workers,
            log=log,
            settings=settings,
            accelerator=accelerator,
        )
        if accelerator.is_main_process:
            write_predictions(folder / "predictions.json", evaluation.predictions)
            defined = {k: None if v != v else v for k, v in evaluation.metrics.items()}
            write_json(folder / "metrics.json", defined)
        accelerator.wait_for_everyone()  # before any log is gone
    if not accelerator.is_main_process:
        return
    for leftover in folder.glob(f"*{PARTIAL}"):  # of as many processes as there were before
        leftover.unlink(missing_ok=True)  # each process removes its own
    add_evaluation(
        record,
        {
            "weights": digest,
            "model": facts["model"],
            "task": task,
            "image_size": size,
            "data": dataset.name,
            "images": len(dataset),
            "origin": facts.get("source") or f"run {facts.get('run', '')}, {facts['steps']} steps",
        },
        evaluation.metrics,
        published=facts["metrics"] if "source" in facts else {},
    )
    print_metrics(f"{facts['model']} on {dataset.name}", task, evaluation.metrics)
    typer.echo(f"Predictions: {folder / 'predictions.json'}")
    typer.echo(f"Record:      {record}")


def _key(weights: str, dataset: Dataset, size: int) -> str:
    """Digits that name the evaluation of some weights on some data."""
    from effspinenet_lib.training.config import describe_data

    facts = f"{weights} {describe_data(dataset)['digest']} {size}"
    return sha256(facts.encode()).hexdigest()[:KEY_DIGITS]


def _log(
    folder: Path, key: str, task: str, accelerator: Accelerator
) -> AbstractContextManager[PredictionLog | None]:
    """Where a process keeps what it has of its share of the images, so that it can go on."""
    from effspinenet_lib.training.prediction_log import PredictionLog

    if task not in ("detection", "instances"):
        return nullcontext()
    number, processes = accelerator.process_index + 1, accelerator.num_processes
    share = "" if processes == 1 else f"-{number}-of-{processes}"
    return PredictionLog(folder / f"predictions{share}{PARTIAL}", key)


def _category_ids(
    weights: Path, categories: list[Mapping[str, Any]], dataset: Dataset
) -> list[int | None]:
    """The data's category of each label of the weights; None for a class that no data has.

    Raises:
        DataError: the labels of the weights mean something else than those of the data.
    """
    used = [category for category in categories if not category["name"].startswith(UNUSED)]
    known = [category["name"] for category in used]
    found = [category.name for category in dataset.categories]
    if known != found:
        differing = sorted(set(known) ^ set(found)) or ["their order"]
        raise DataError(
            f"{weights} was trained on other categories than {dataset.name} has: "
            f"{', '.join(differing[:5])}; evaluate on data with the same list"
        )
    ids = {category.name: category.id for category in dataset.categories}
    return [ids.get(category["name"]) for category in categories]
