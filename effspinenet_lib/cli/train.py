"""`effspinenet train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effspinenet_lib.cli.console import parse_settings, print_metrics
from effspinenet_lib.cli.data import Data, EvalSplit, Workers, data_config

if TYPE_CHECKING:
    from effspinenet_lib.recipes import Recipe

Task = Annotated[
    str, typer.Option(help="`detection`, `instances`, `classification` or `segmentation`.")
]


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(train)


def train(
    data: Data,
    model: Annotated[
        str, typer.Option(help="A name that `effspinenet models` lists.")
    ] = "eff_spinenet_m0",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels. [default: the model's own]")
    ] = None,
    task: Task = "detection",
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
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a step.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, help="Rate after the warmup.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and augmentation.")] = 0,
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Each run gets a folder of its own in it; use another one for other data.",
        ),
    ] = Path("runs"),
    workers: Workers = 0,
    train_split: Annotated[str, typer.Option(help="Part of the data to train on.")] = "train",
    eval_split: EvalSplit = "val",
    images: Annotated[
        int | None, typer.Option(min=1, help="Use only the first so many of each part.")
    ] = None,
    overfit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Train and evaluate on the first N images of the training part, without "
            "augmentation: a check that the model can learn them by heart.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A setting of the model, as for `cost`."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Train a finished run anew.")] = False,
) -> None:
    """Train a model, evaluate it, keep its weights.

    Classification is of single objects, cut out of the pictures.

    The same command given again goes on with a run that was stopped, and does not train a
    finished one again.

    For example:

    - `effspinenet train --data shapescenes --image-size 128 --steps 500`
    - `effspinenet train --data my_pictures --image-size 256 --eval-split test`
    - `effspinenet train --data my_pictures --overfit 8 --steps 300`
    - `effspinenet train --data shapescenes --task segmentation --image-size 128`
    """
    from effspinenet_lib.recipes import SMALL_DATA_RECIPES, get_recipe
    from effspinenet_lib.training.run import RunConfig, train_run
    from effspinenet_lib.zoo import default_image_size

    size = image_size or default_image_size(model, task)
    name = recipe or SMALL_DATA_RECIPES[task]
    settings = _changed(get_recipe(name), steps, batch_size, learning_rate)
    if overfit is not None:
        settings, eval_split, images = _without_augmentation(settings), train_split, overfit
    config = RunConfig(
        model=model,
        task=task,
        image_size=size,
        data=data_config(data, train_split, eval_split, images, size),
        recipe=settings,
        seed=seed,
        model_options=parse_settings(option or []),
    )
    result = train_run(config, output, force=force, workers=workers)
    print_metrics(f"{model} on {data}, {task}", task, result.metrics)
    typer.echo(
        f"{result.steps} steps, {result.images} images, {result.wall_seconds:.0f} s, "
        f"{result.images_per_second:.1f} images/s in training"
    )
    typer.echo(f"Run:     {result.folder}")
    typer.echo(f"Weights: {result.folder / 'model.safetensors'}")


def _changed(
    recipe: Recipe, steps: int | None, batch_size: int | None, learning_rate: float | None
) -> Recipe:
    """The recipe with the settings that were given."""
    changes: dict[str, Any] = {"batch_size": batch_size, "learning_rate": learning_rate}
    recipe = recipe if steps is None else recipe.scaled_to(steps)
    return recipe.with_(**{name: value for name, value in changes.items() if value is not None})


def _without_augmentation(recipe: Recipe) -> Recipe:
    return recipe.with_(scale_jitter=(1.0, 1.0), flip_probability=0.0, stochastic_depth=0.0)
