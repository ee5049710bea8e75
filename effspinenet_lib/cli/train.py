"""`effspinenet train`, `evaluate`, `detect` and `export`."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effspinenet_lib.cli.console import (
    draw,
    parse_settings,
    print_metrics,
    print_table,
    save_picture,
)
from effspinenet_lib.cli.data import (
    DATA_HELP,
    Data,
    EvalSplit,
    Workers,
    data_config,
)
from effspinenet_lib.errors import CheckpointError, DataError, UnknownName, UserError
from effspinenet_lib.training.recipes import EVALUATION_BATCH

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from effspinenet_lib.data import Dataset
    from effspinenet_lib.training.recipes import Recipe
    from effspinenet_lib.training.run import RunResult

EVALUATIONS = Path("runs") / "evaluations"
HASH_DIGITS = 12  # as of a run's hash
UNUSED = "unused "  # beginning of the name of a class that no data set has

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
    data: Annotated[str, typer.Option(metavar="DIR|shapescenes", help=DATA_HELP)],
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
    result = train_run(
        config,
        output,
        force=force,
        workers=workers,
        max_steps=max_steps,
        checkpoints=checkpoints or KEPT,
        micro_batch=micro_batch,
        runs_csv=output / "runs.csv",
    )
    print_run(f"{model} on {data}, {task}", task, result)


def take_threads() -> None:
    """Choose the threads of this process; called before anything that loads torch."""
    import os

    from effspinenet_lib.experiments.launcher import free_cores, thread_environment

    os.environ.update(thread_environment(free_cores()))


def print_threads() -> None:
    """Say what this process has taken; `OMP_NUM_THREADS` sets another number."""
    import torch

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
    from effspinenet_lib.data import open_dataset
    from effspinenet_lib.data.augment import FITTED
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
    dataset = open_dataset(source, "eval", task)
    ids = _category_ids(weights, facts["categories"], dataset)
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
            category_ids=ids,
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


def _category_ids(
    weights: Path, categories: list[Mapping[str, Any]], dataset: Dataset
) -> list[int | None]:
    """The data's category of each label of the weights; None for a class that no data has.

    Raises:
        DataError: the labels of the weights mean something else than those of the data.
    """
    known = [c["name"] for c in categories if not c["name"].startswith(UNUSED)]
    found = [category.name for category in dataset.categories]
    if known != found:
        differing = sorted(set(known) ^ set(found)) or ["their order"]
        raise DataError(
            f"{weights} was trained on other categories than {dataset.name} has: "
            f"{', '.join(differing[:5])}; evaluate on data with the same list"
        )
    ids = {category.name: category.id for category in dataset.categories}
    return [ids.get(category["name"]) for category in categories]


def detect(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture to look at.")],
    weights: Weights,
    output: Annotated[Path, typer.Option(metavar="OUT.png", help="The picture with boxes.")] = Path(
        "detections.png"
    ),
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Boxes with a lower score are left out.")
    ] = 0.3,
    image_size: TrainedSize = None,
) -> None:
    """Find objects in a picture; draw their boxes, and masks if the model gives them; list them.

    Example: `effspinenet detect street.jpg --weights model.safetensors --output found.png`
    """
    import numpy as np
    from PIL import Image, ImageOps

    from effspinenet_lib.data.augment import FITTED
    from effspinenet_lib.training.checkpoint import create_from_weights

    model, facts = create_from_weights(weights)
    if facts["task"] not in ("detection", "instances"):
        raise UserError(f"{weights}: is a model for {facts['task']}; detect needs one that detects")
    try:
        with Image.open(image) as opened:
            pixels = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    except FileNotFoundError as error:
        raise DataError(f"{image}: no such file") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{image}: cannot be decoded ({error}); save the picture again") from error
    size, preprocessing = image_size or facts["image_size"], facts.get("preprocessing", FITTED)
    found = detections(model, pixels, size, preprocessing)
    found = {name: values[found["scores"] >= threshold] for name, values in found.items()}
    labels, scores = found["labels"].tolist(), found["scores"].tolist()
    names = [facts["categories"][label]["name"] for label in labels]
    texts = [f"{name} {score:.2f}" for name, score in zip(names, scores, strict=True)]
    save_picture(draw(pixels, found["boxes"], labels, texts, found.get("masks")), output)
    rows = [
        (name, f"{score:.2f}", *(f"{value:.0f}" for value in box))
        for name, score, box in zip(names, scores, found["boxes"].tolist(), strict=True)
    ]
    print_table(str(image), ("class", "score", "left", "top", "right", "bottom"), rows)
    typer.echo(f"{len(rows)} objects with a score of at least {threshold}; wrote {output}")


def detections(
    model: nn.Module, picture: NDArray[np.uint8], image_size: int, preprocessing: str = "fitted"
) -> dict[str, Tensor]:
    """Run a detector in evaluation mode on one picture.

    Args:
        model: as `create_model` gives it.
        picture: uint8 [H, W, 3].
        image_size: side of the square input; the picture's long side is resized to it.
        preprocessing: one of `data.augment.PREPROCESSINGS`.

    Returns:
        `boxes` [K, 4] in pixels of the picture, `scores` [K] falling, `labels` int64 [K] and, of
        a model for instances, `masks` bool [K, H, W].
    """
    import torch

    from effspinenet_lib.data.augment import fit_image
    from effspinenet_lib.training.evaluate import paste_masks, to_original

    height, width = picture.shape[:2]
    image, scales = fit_image(picture, image_size, preprocessing)
    with torch.inference_mode():
        device = next(model.parameters(), image).device
        found: dict[str, Tensor] = model(image[None].to(device))[0]
    boxes = to_original(found["boxes"], scales, (height, width))
    result = {"boxes": boxes, "scores": found["scores"].cpu(), "labels": found["labels"].cpu()}
    if "masks" in found:
        result["masks"] = paste_masks(found["masks"], boxes, (height, width))
    return result


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
