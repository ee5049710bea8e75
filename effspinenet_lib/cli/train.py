"""`effspinenet train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effspinenet_lib.cli.console import parse_settings, print_metrics
from effspinenet_lib.cli.data import DATA_HELP, SHAPESCENES, EvalSplit, Workers, data_config
from effspinenet_lib.errors import UserError

if TYPE_CHECKING:
    from effspinenet_lib.training.recipes import Recipe
    from effspinenet_lib.training.run import RunResult

Task = Annotated[
    str, typer.Option(help="`detection`, `instances`, `classification` or `segmentation`.")
]


# Options that a row of an item decides, and those that only it reads.
FREE_OPTIONS = (
    *("model", "image_size", "task", "recipe", "steps", "learning_rate", "output"),
    *("train_split", "eval_split", "images", "overfit", "option"),
)
ITEM_OPTIONS = ("row", "profile", "results_dir")


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(train)


def train(
    context: typer.Context,
    data: Annotated[
        str | None, typer.Option(metavar="DIR|shapescenes", help=DATA_HELP, show_default=False)
    ] = None,
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
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Stop after so many steps of the unchanged schedule."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images a step; the recipe's rate and steps are scaled to them."),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images computed at once; gradients add up to the batch's."),
    ] = None,
    checkpoints: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many of the last checkpoints are kept. [default: the newest and the one "
            "before]",
        ),
    ] = None,
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
    initial_weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Start from the backbone of a trained model."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Train a finished run anew.")] = False,
    item: Annotated[
        str | None,
        typer.Option(help="Train a row of this table as the paper does, such as `table-03`."),
    ] = None,
    row: Annotated[
        str | None, typer.Option(help="The row: its label in the table, or its model.")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="With --item: `smoke`, `proxy` or `paper`.")
    ] = "paper",
    results_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="With --item: where the row goes. [default: the checkout's results]"
        ),
    ] = None,
) -> None:
    """Train a model, evaluate it, keep its weights.

    Classification is of single objects, cut out of the pictures, unless the data is in ImageNet's
    layout.

    The same command given again goes on with a run that was stopped, and does not train a
    finished one again.

    With `--item` it is a row of a table of the paper: model, task, image size and recipe are the
    row's, and what is measured goes to the results files. At the paper's settings a processor takes
    a batch of 2 with the recipe scaled to it, unless `--batch-size` says another or `--micro-batch`
    makes up the whole one. With `--max-steps` the row is labelled with its steps.

    For example:

    - `effspinenet train --data shapescenes --image-size 128 --steps 500`
    - `effspinenet train --data my_pictures --image-size 256 --eval-split test`
    - `effspinenet train --data my_pictures --overfit 8 --steps 300`
    - `effspinenet train --data shapescenes --task segmentation --image-size 128`
    - `effspinenet train --item table-03 --row eff_spinenet_d2 --data coco --max-steps 3`
    """
    if item is not None:
        _refuse(context, FREE_OPTIONS, "has no meaning with --item: the row decides it")
        if row is None:
            raise UserError("--item needs --row: the row's label or its model")
        _train_row(
            item,
            row,
            profile,
            data,
            results_dir,
            seed,
            batch_size,
            micro_batch,
            max_steps,
            checkpoints,
            workers,
            initial_weights,
            force,
        )
        return
    _refuse(context, ITEM_OPTIONS, "has no meaning without --item")
    if data is None:
        raise UserError(f"--data is missing: give a folder, or `{SHAPESCENES}`")
    from effspinenet_lib.models.zoo import default_image_size
    from effspinenet_lib.training.checkpoint import KEPT
    from effspinenet_lib.training.recipes import SMALL_DATA_RECIPES, get_recipe
    from effspinenet_lib.training.run import RunConfig, train_run

    size = image_size or default_image_size(model, task)
    name = recipe or SMALL_DATA_RECIPES[task]
    settings = _changed(get_recipe(name), steps, batch_size, learning_rate)
    if overfit is not None:
        settings, eval_split, images = _without_augmentation(settings), train_split, overfit
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
    result = train_run(
        config,
        output,
        force=force,
        workers=workers,
        max_steps=max_steps,
        checkpoints=checkpoints or KEPT,
        micro_batch=micro_batch,
    )
    print_metrics(f"{model} on {data}, {task}", task, result.metrics)
    _print_run(result)


def _refuse(context: typer.Context, options: tuple[str, ...], reason: str) -> None:
    """Refuse the first of `options` that the command line names."""
    for name in options:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(f"--{name.replace('_', '-')} {reason}")


def _train_row(
    item: str,
    row: str,
    profile: str,
    data: str | None,
    results_dir: Path | None,
    seed: int,
    batch_size: int | None,
    micro_batch: int | None,
    max_steps: int | None,
    checkpoints: int | None,
    workers: int,
    initial_weights: Path | None,
    force: bool,
) -> None:
    """Train a row of an item and say where what it gave is."""
    from effspinenet_lib import experiments
    from effspinenet_lib.results import ResultsStore
    from effspinenet_lib.training.checkpoint import KEPT

    chosen = experiments.get_item(item)
    if not chosen.rows:
        raise UserError(f"{item} trains nothing; see `effspinenet results`")
    parameters = experiments.check_parameters(
        profile=profile,
        data_root=data,
        results_dir=results_dir,
        seeds=seed,
        force=force,
    )
    if initial_weights is not None:
        parameters = replace(parameters, initial_weights=initial_weights.resolve())
    found = experiments.find_row(chosen, row)
    result = experiments.train_row(
        chosen,
        found,
        parameters,
        batch_size=batch_size,
        micro_batch=micro_batch,
        max_steps=max_steps,
        checkpoints=checkpoints or KEPT,
        workers=workers,
    )
    print_metrics(f"{item}, {found.label}, {profile}", found.task, result.metrics)
    _print_run(result)
    store = ResultsStore(parameters.results_dir, profile)
    typer.echo(f"Results: {store.folder / item}.csv")


def _print_run(result: RunResult) -> None:
    typer.echo(
        f"{result.steps} steps, {result.images} images, {result.wall_seconds:.0f} s, "
        f"{result.images_per_second:.1f} images/s in training"
    )
    typer.echo(f"Run:     {result.folder}")
    typer.echo(f"Weights: {result.folder / 'model.safetensors'}")


def _changed(
    recipe: Recipe, steps: int | None, batch_size: int | None, learning_rate: float | None
) -> Recipe:
    """The recipe for a batch, with the steps and the rate that were given in place of its own."""
    recipe = recipe if batch_size is None else recipe.for_batch(batch_size)
    recipe = recipe if steps is None else recipe.scaled_to(steps)
    return recipe if learning_rate is None else recipe.with_(learning_rate=learning_rate)


def _without_augmentation(recipe: Recipe) -> Recipe:
    return recipe.with_(scale_jitter=(1.0, 1.0), flip_probability=0.0, stochastic_depth=0.0)
