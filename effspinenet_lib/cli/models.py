"""`effspinenet models`, `cost`, `wiring` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effspinenet_lib.cli.console import parse_settings, print_table
from effspinenet_lib.errors import UnknownName, UserError

PICTURE_FORMATS = ("svg", "png")
PICTURE_DPI = 150


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(models)
    app.command()(cost)
    app.command()(wiring)
    app.command()(export)


def models() -> None:
    """List the models, their input size for each task that they can do, and where they stand.

    `effspinenet cost NAME` counts a model's multi-adds and parameters.
    """
    from effspinenet_lib.models.zoo import TASKS, list_models, model_entry

    rows = [
        (
            name,
            *(model_entry(name).image_sizes.get(task, "–") for task in TASKS),
            ", ".join(sorted(items)) or "not in the paper",
        )
        for name, items in list_models().items()
    ]
    print_table("Models, with input sizes in pixels", ("name", *TASKS, "stands in"), rows)


def cost(
    name: Annotated[str, typer.Argument(help="A name that `effspinenet models` lists.")],
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels. [default: the model's own]")
    ] = None,
    task: Annotated[str, typer.Option(help="What the model is for.")] = "detection",
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Classes in the head. [default: the task's own]")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="A setting of the model, such as `space_to_depth=false`."
        ),
    ] = None,
) -> None:
    """Count the multi-adds and parameters of a model, traced on the model itself.

    For example:

    - `effspinenet cost eff_spinenet_d0`
    - `effspinenet cost eff_spinenet_d0 --option space_to_depth=false`
    """
    from effspinenet_lib.models.cost import measure_cost
    from effspinenet_lib.models.zoo import check_model, create_model, default_image_size

    options = parse_settings(option or [])
    check_model(name, task, options)
    classes = {} if num_classes is None else {"num_classes": num_classes}
    model = create_model(name, task=task, **classes, **options)
    size = image_size or default_image_size(name, task)
    typer.echo(f"{measure_cost(model, image_size=size)} at {size}x{size}")


def wiring(
    name: Annotated[
        str, typer.Argument(help="A scale-permuted model, or the file of a distribution.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT.svg|OUT.png", help="File to write.")],
) -> None:
    """Draw which block of a scale-permuted model feeds which.

    Example: `effspinenet wiring eff_spinenet_d0 wiring.svg`
    """
    from effspinenet_lib.files import atomic_write, ensure_folder
    from effspinenet_lib.models.zoo import is_distribution, read_distribution
    from effspinenet_lib.report.diagrams import wiring_figure, wirings

    known = wirings()
    if is_distribution(name):
        known[name] = read_distribution(name).backbone
    if name not in known:
        raise UnknownName("scale-permuted model", name, known)
    kind = output.suffix.lower().removeprefix(".")
    if kind not in PICTURE_FORMATS:
        raise UserError(f"{output}: end its name in .{' or .'.join(PICTURE_FORMATS)}")
    ensure_folder(output.parent)
    with atomic_write(output, "wb") as handle:
        figure = wiring_figure(known[name])
        figure.savefig(handle, format=kind, dpi=PICTURE_DPI, facecolor="white")
    typer.echo(f"Wrote {output}")


def export(
    weights: Annotated[Path, typer.Option(metavar="FILE", help="As `train` writes them.")],
    output: Annotated[Path, typer.Option(metavar="OUT.pt2", help="The program to write.")],
    image_size: Annotated[
        int | None, typer.Option(min=1, help="[default: as the model was trained]")
    ] = None,
) -> None:
    """Write a trained model as a `torch.export` program, which runs without this library.

    It maps normalised images [1, 3, S, S] to what the layers give, before decoding.

    Example: `effspinenet export --weights model.safetensors --output model.pt2`
    """
    from effspinenet_lib.files import ensure_folder
    from effspinenet_lib.training.checkpoint import create_from_weights
    from effspinenet_lib.training.export import export_model

    model, facts = create_from_weights(weights)
    size = image_size or facts["image_size"]
    ensure_folder(output.parent)
    export_model(model.cpu(), size, output)
    typer.echo(f"Wrote {output}: {facts['model']}, {facts['task']}, {size}x{size}")
