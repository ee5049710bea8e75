"""`effspinenet train`, `evaluate`, `detect` and `export`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effspinenet_lib.cli.console import (
    draw,
    parse_settings,
    print_metrics,
    print_table,
    readable,
    save_picture,
)
from effspinenet_lib.cli.data import Data, EvalSplit, Workers, data_config
from effspinenet_lib.errors import CheckpointError, DataError, UnknownName, UserError
from effspinenet_lib.training.recipes import EVALUATION_BATCH

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from effspinenet_lib.training.recipe import Recipe
    from effspinenet_lib.training.run import RunResult

EVALUATIONS = Path("runs") / "evaluations"
SIDES = ("left", "top", "right", "bottom")  # of a box
HASH_DIGITS = 12  # as of a run's hash

# Options of everything that trains one model.
Images = Annotated[
    int | None, typer.Option(min=1, help="Use only the first so many of each split.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Images a step; the recipe's rate and steps are scaled to them."),
]
MicroBatch = Annotated[
    int | None,
    typer.Option(min=1, help="Images computed at once; gradients add up to the batch's."),
]
MaxSteps = Annotated[
    int | None, typer.Option(min=1, help="Stop after so many steps of the unchanged schedule.")
]
Checkpoints = Annotated[
    int | None,
    typer.Option(
        min=1, help="How many of the last checkpoints are kept. [default: the newest two]"
    ),
]
InitialWeights = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Start from the backbone of a trained model."),
]
Weights = Annotated[Path, typer.Option(metavar="FILE", help="As `train` and `convert` write them.")]
TrainedSize = Annotated[int | None, typer.Option(min=1, help="[default: as the model was trained]")]


def train(
    data: Data,
    model: Annotated[
        str, typer.Option(help="A name that `effspinenet models` lists.")
    ] = "eff_spinenet_m0",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels. [default: the model's own]")
    ] = None,
    task: Annotated[
        str, typer.Option(help="`detection`, `instances`, `classification` or `segmentation`.")
    ] = "detection",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Training settings by name; the options below change them. "
            "[default: small_data_<task>]"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps; the schedule keeps its shape.")
    ] = None,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = None,
    micro_batch: MicroBatch = None,
    checkpoints: Checkpoints = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, help="Rate after the warmup.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and augmentation.")] = 0,
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Each run gets a folder of its own in it and a row in its runs.csv; use another "
            "one for other data.",
        ),
    ] = Path("runs"),
    workers: Workers = 0,
    train_split: Annotated[str, typer.Option(help="Split of the data to train on.")] = "train",
    eval_split: EvalSplit = "val",
    images: Images = None,
    overfit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Train and evaluate on the first N images of the training split, without "
            "augmentation: a check that the model can learn them by heart.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of the model, as for `cost`."),
    ] = None,
    initial_weights: InitialWeights = None,
    skip_bad_images: Annotated[
        bool,
        typer.Option(
            "--skip-bad-images", help="Leave out images that are missing or cannot be decoded."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Train a finished run again.")] = False,
) -> None:
    """Train a model, evaluate it, keep its weights.

    Classification is of single objects, cut out of the pictures, unless the data is in ImageNet's
    layout.

    The same command resumes a run that was stopped, and does not train a finished one again. A row
    of a table of the paper is trained by `effspinenet reproduce ITEM --row ROW`.

    For example:

    - `effspinenet train --data shapescenes --image-size 128 --steps 500`
    - `effspinenet train --data my_pictures --image-size 256 --eval-split test`
    - `effspinenet train --data my_pictures --overfit 8 --steps 300`
    - `effspinenet train --data shapescenes --task segmentation --image-size 128`
    """
    take_threads()
    from effspinenet_lib.models.zoo import default_image_size
    from effspinenet_lib.training.checkpoint import KEPT
    from effspinenet_lib.training.recipes import SMALL_DATA_RECIPES, get_recipe
    from effspinenet_lib.training.run import RunConfig, train_run

    size = image_size or default_image_size(model, task)
    settings = get_recipe(recipe or SMALL_DATA_RECIPES[task])
    settings = adjust_recipe(settings, steps, batch_size, learning_rate)
    if overfit is not None:
        settings = settings.replace(
            scale_jitter=(1.0, 1.0), flip_probability=0.0, stochastic_depth=0.0
        )
        eval_split, images = train_split, overfit
    config = RunConfig(
        model=model,
        task=task,
        image_size=size,
        data=data_config(data, train_split, eval_split, images, size, task=task),
        recipe=settings,
        seed=seed,
        model_options=parse_settings(option or []),
        initial_weights=None if initial_weights is None else str(initial_weights.resolve()),
    )
    print_threads()
    typer.echo(
        f"Recipe:  {settings.name}, {settings.steps:,} steps of {settings.batch_size} images, "
        f"{settings.optimizer}, learning rate {settings.learning_rate:g}"
    )
    result = train_run(
        config,
        output,
        force=force,
        workers=workers,
        max_steps=max_steps,
        checkpoints=checkpoints or KEPT,
        micro_batch=micro_batch,
        runs_csv=output / "runs.csv",
        skip_bad_images=skip_bad_images,
    )
    print_run(f"{model} on {data}, {task}", task, result)


def take_threads() -> None:
    """Choose the threads of this process; called before anything that loads torch."""
    import os

    from effspinenet_lib.experiments.launcher import free_cores, thread_environment

    os.environ.update(thread_environment(free_cores()))


def print_threads() -> None:
    """Say what this process computes on; `OMP_NUM_THREADS` sets another number of threads."""
    import torch

    from effspinenet_lib.training.device import CPU, present_accelerators

    typer.echo(f"Device:  {', '.join(sorted(present_accelerators())) or CPU}")
    typer.echo(f"Threads: {torch.get_num_threads()} (OMP_NUM_THREADS sets another number)")


def adjust_recipe(
    recipe: Recipe, steps: int | None, batch_size: int | None, learning_rate: float | None
) -> Recipe:
    """Scale a recipe to a batch, then replace its steps and learning rate where they are given."""
    recipe = recipe if batch_size is None else recipe.scale_to_batch(batch_size)
    recipe = recipe if steps is None else recipe.scale_to_steps(steps)
    return recipe if learning_rate is None else recipe.replace(learning_rate=learning_rate)


def print_run(title: str, task: str, result: RunResult) -> None:
    """Print what a run measured, how long it took and where its files are."""
    print_metrics(title, task, result.metrics)
    record = result.record
    typer.echo(
        f"{result.steps} steps, {record['images']} images, {record['wall_seconds']:.0f} s, "
        f"{record['images_per_second']:.1f} images/s in training"
    )
    if result.trained_before:
        typer.echo(f"already finished on {record['date']}; not trained again (--force)")
    typer.echo(f"Run:     {result.folder}")
    typer.echo(f"Weights: {result.folder / 'model.safetensors'}")


def evaluate(
    weights: Weights,
    data: Data,
    model: Annotated[
        str | None, typer.Option(help="Checked against the weights file, which knows its model.")
    ] = None,
    eval_split: EvalSplit = "val",
    images: Images = None,
    image_size: TrainedSize = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = EVALUATION_BATCH,
    workers: Workers = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="For predictions.json (COCO's result format) and metrics.json. "
            f"[default: a folder of the evaluation's own in {EVALUATIONS}]",
        ),
    ] = None,
    record: Annotated[
        Path, typer.Option(metavar="FILE.csv", help="Where the metrics are added, a row each.")
    ] = EVALUATIONS / "evaluations.csv",
) -> None:
    """Measure a model by the metrics of its task.

    Detection and instances: the 12 COCO metrics of boxes, and of masks. Classification: top-1 and
    top-5. Segmentation: mIOU. Under `torchrun` the processes share the images.

    For example:

    - `effspinenet evaluate --weights runs/0123456789ab/model.safetensors --data my_pictures`
    - `effspinenet evaluate --model mobile_spinenet_49 --weights mobile.safetensors --data coco
      --workers 2`
    """
    from effspinenet_lib.data import Category
    from effspinenet_lib.data.augment import FITTED
    from effspinenet_lib.data.check import open_checked
    from effspinenet_lib.files import ensure_folder, write_json
    from effspinenet_lib.results import upsert
    from effspinenet_lib.training.checkpoint import create_from_weights
    from effspinenet_lib.training.config import describe_data
    from effspinenet_lib.training.device import make_accelerator
    from effspinenet_lib.training.evaluate import evaluate as measure
    from effspinenet_lib.training.evaluate import write_predictions
    from effspinenet_lib.training.preemption import lost_processes

    accelerator = make_accelerator()
    network, facts = create_from_weights(weights)
    if model not in (None, facts["model"]):
        raise CheckpointError(f"{weights}: is of model {facts['model']}, not of {model}")
    task, size = facts["task"], image_size or facts["image_size"]
    source = data_config(data, eval_split=eval_split, images=images, image_size=size, task=task)
    (dataset,) = open_checked(source, [source.part_of("eval")], task)
    classes = [Category(c["id"], c["name"]) for c in facts["categories"]]
    dataset.relabel(classes, f"the weights {weights}")
    digest = sha256(weights.read_bytes()).hexdigest()[:HASH_DIGITS]
    name = sha256(f"{digest} {describe_data(dataset)['digest']} {size}".encode()).hexdigest()
    folder = ensure_folder(output or EVALUATIONS / name[:HASH_DIGITS])
    ensure_folder(record.parent)
    with lost_processes():
        evaluation = measure(
            network.to(accelerator.device),
            dataset,
            task,
            size,
            batch_size,
            workers,
            accelerator=accelerator,
            preprocessing=facts.get("preprocessing", FITTED),
        )
    if not accelerator.is_main_process:
        return
    metrics = evaluation.metrics
    write_predictions(folder / "predictions.json", evaluation.predictions)
    write_json(folder / "metrics.json", {k: None if v != v else v for k, v in metrics.items()})
    common = {
        "weights": digest,
        "model": facts["model"],
        "task": task,
        "image_size": size,
        "data": dataset.name,
        "images": len(dataset),
        "unit": "%",
        "origin": facts.get("source") or f"run {facts.get('run', '')}, {facts['steps']} steps",
    }
    published = facts["metrics"] if "source" in facts else {}  # by the authors of the weights
    rows = [
        {**common, "metric": metric, "value": value, "published": published.get(metric)}
        for metric, value in metrics.items()
    ]
    upsert(record, "evaluation", rows, f"evaluation of {weights}")
    print_metrics(f"{facts['model']} on {dataset.name}", task, metrics)
    typer.echo(f"Predictions: {folder / 'predictions.json'}")
    typer.echo(f"Record:      {record}")


def detect(
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE|DIR...", help="Pictures, or folders of them.")
    ],
    weights: Weights,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.png|DIR",
            help="The picture with boxes, or for several a folder. "
            "[default: detections.png or detections/]",
        ),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Boxes with a lower score are left out.")
    ] = 0.3,
    image_size: TrainedSize = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what was found as JSON.")
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write what was found as CSV.")
    ] = None,
) -> None:
    """Find objects in pictures; draw their boxes, and masks if the model gives them; list them.

    For example:

    - `effspinenet detect street.jpg --weights model.safetensors --output found.png`
    - `effspinenet detect my_pictures/test --weights model.safetensors --output found --csv
      found.csv`
    """
    import pandas as pd
    from tqdm.auto import tqdm

    from effspinenet_lib.data.augment import FITTED
    from effspinenet_lib.files import atomic_write, ensure_folder, write_json
    from effspinenet_lib.training.checkpoint import create_from_weights
    from effspinenet_lib.training.export import inference_copy

    model, facts = create_from_weights(weights)
    if facts["task"] not in ("detection", "instances"):
        raise UserError(f"{weights}: is a model for {facts['task']}; detect needs one that detects")
    folded = inference_copy(model)
    size, preprocessing = image_size or facts["image_size"], facts.get("preprocessing", FITTED)
    several = len(images) > 1 or images[0].is_dir()
    files = pictures_in(images)
    places = [output or Path("detections.png")]
    if several:
        places = [(output or Path("detections")) / name for _, name in files]
    found_records: list[dict[str, Any]] = []
    paths = [path for path, _ in files]
    detected = _in_batches(folded, paths, size, preprocessing)
    bar = tqdm(detected, "detect", len(paths), unit="image", disable=None if several else True)
    for path, place, (pixels, found) in zip(paths, places, bar, strict=True):
        found = {name: values[found["scores"] >= threshold] for name, values in found.items()}
        labels, scores = found["labels"].tolist(), found["scores"].tolist()
        names = [facts["categories"][label]["name"] for label in labels]
        texts = [
            f"{readable(name, label)} {score:.2f}"
            for name, label, score in zip(names, labels, scores, strict=True)
        ]
        save_picture(draw(pixels, found["boxes"], labels, texts, found.get("masks")), place)
        records = [
            {
                "image": str(path),
                "class": name,
                "score": score,
                **dict(zip(SIDES, box, strict=True)),
            }
            for name, score, box in zip(names, scores, found["boxes"].tolist(), strict=True)
        ]
        found_records += records
        if not several:
            rows = [
                (r["class"], f"{r['score']:.2f}", *(f"{r[side]:.0f}" for side in SIDES))
                for r in records
            ]
            print_table(str(path), ("class", "score", *SIDES), rows)
    if json_file is not None:
        ensure_folder(json_file.parent)
        write_json(json_file, found_records)
        typer.echo(f"Wrote {json_file}")
    if csv_file is not None:
        ensure_folder(csv_file.parent)
        table = pd.DataFrame(found_records, columns=["image", "class", "score", *SIDES])
        with atomic_write(csv_file) as handle:
            table.to_csv(handle, index=False, lineterminator="\n")
        typer.echo(f"Wrote {csv_file}")
    where = places[0].parent if several else places[0]
    count = f" in {len(files)} pictures" if several else ""
    number = len(found_records)
    typer.echo(
        f"{number} object{'s' * (number != 1)} with a score of at least {threshold}{count}; "
        f"wrote {where}"
    )


def pictures_in(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """The pictures given, and those in folders given; each with a name of its own for its drawing.

    Raises:
        DataError: a path does not exist, or there is no picture.
    """
    from effspinenet_lib.data.pictures import is_picture, visible

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += [path / name for name in visible(path) if is_picture(name)]
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file")
    if not files:
        raise DataError(f"{paths[0]}: has no pictures")
    named: dict[str, Path] = {}
    for path in files:
        name, number = f"{path.stem}.png", 1
        while name in named:
            number += 1
            name = f"{path.stem} {number}.png"
        named[name] = path
    return [(path, name) for name, path in named.items()]


def _in_batches(
    model: nn.Module, paths: Sequence[Path], image_size: int, preprocessing: str
) -> Iterator[tuple[NDArray[np.uint8], dict[str, Tensor]]]:
    """Each picture and what a detector finds in it; a batch of an evaluation at once."""
    from effspinenet_lib.data.pictures import read_picture

    for first in range(0, len(paths), EVALUATION_BATCH):
        pictures = [read_picture(path) for path in paths[first : first + EVALUATION_BATCH]]
        found = detections(model, pictures, image_size, preprocessing)
        yield from zip(pictures, found, strict=True)


def detections(
    model: nn.Module,
    pictures: Sequence[NDArray[np.uint8]],
    image_size: int,
    preprocessing: str = "fitted",
) -> list[dict[str, Tensor]]:
    """Run a detector in evaluation mode on pictures, all at once.

    Args:
        model: as `create_model` gives it.
        pictures: each uint8 [H, W, 3].
        image_size: side of the square input; a picture's long side is resized to it.
        preprocessing: one of `data.augment.PREPROCESSINGS`.

    Returns:
        Of each `boxes` [K, 4] in its pixels, `scores` [K] falling, `labels` int64 [K] and, of a
        model for instances, `masks` bool [K, H, W].
    """
    import torch

    from effspinenet_lib.data.augment import FITTED, fit_image, scaled_size
    from effspinenet_lib.training.evaluate import paste_masks, to_original

    sizes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
    fitted = [fit_image(picture, image_size, preprocessing) for picture in pictures]
    images = torch.stack([image for image, _ in fitted])
    more = {}
    if preprocessing == FITTED:  # what is left of the input is padding
        places = zip(sizes, fitted, strict=True)
        more = {"extents": [scaled_size(*size, scales[0]) for size, (_, scales) in places]}
    with torch.inference_mode():
        device = next(model.parameters(), images).device
        outputs: list[dict[str, Tensor]] = model(images.to(device), **more)
    results = []
    for found, size, (_, scales) in zip(outputs, sizes, fitted, strict=True):
        boxes = to_original(found["boxes"], scales, size)
        result = {"boxes": boxes, "scores": found["scores"].cpu(), "labels": found["labels"].cpu()}
        if "masks" in found:
            result["masks"] = paste_masks(found["masks"], boxes, size)
        results.append(result)
    return results


def export(
    weights: Weights,
    output: Annotated[Path, typer.Option(metavar="OUT", help="The program to write.")],
    format: Annotated[
        str, typer.Option(help="`torch` (a file .pt2) or `onnx` (a file .onnx).")
    ] = "torch",
    raw: Annotated[
        bool, typer.Option("--raw", help="Leave decoding and suppression out of an ONNX file.")
    ] = False,
    image_size: TrainedSize = None,
) -> None:
    """Write a trained model as a program that runs without this library.

    `torch`: a `torch.export` program that maps normalised images [1, 3, S, S] to what the layers
    give, before decoding. `onnx`: for images [N, 3, S, S], with N as wanted, to detections, class
    scores or pixel logits; needs the extra `onnx`, and takes no model of the task instances.

    For example:

    - `effspinenet export --weights model.safetensors --output model.pt2`
    - `effspinenet export --weights model.safetensors --format onnx --output model.onnx`
    """
    from effspinenet_lib.files import ensure_folder
    from effspinenet_lib.training.checkpoint import create_from_weights
    from effspinenet_lib.training.export import SUFFIXES, export_model, export_onnx

    if format not in SUFFIXES:
        raise UnknownName("format", format, SUFFIXES)
    if output.suffix != SUFFIXES[format]:
        raise UserError(f"{output}: a file of the format {format} ends in {SUFFIXES[format]}")
    model, facts = create_from_weights(weights)
    size = image_size or facts["image_size"]
    ensure_folder(output.parent)
    if format == "onnx":
        export_onnx(model.cpu(), size, output, not raw, {**facts, "image_size": size})
    else:
        export_model(model.cpu(), size, output)
    typer.echo(f"Wrote {output}: {facts['model']}, {facts['task']}, {size}x{size}")


def card(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    output: Annotated[
        Path | None, typer.Option(metavar="CARD.md", help="[default: README.md in the folder]")
    ] = None,
) -> None:
    """Write a model card in Markdown from what the weights file of a run says about itself.

    Example: `effspinenet card runs/0123456789ab`
    """
    from effspinenet_lib.files import atomic_write
    from effspinenet_lib.models.weights import load_weights, model_card

    _, facts = load_weights(run / "model.safetensors")
    path = output or run / "README.md"
    with atomic_write(path) as handle:
        handle.write(model_card(facts))
    typer.echo(f"Wrote {path}")
