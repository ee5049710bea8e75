"""`effspinenet models` and `effspinenet cost`."""

from __future__ import annotations

from typing import Annotated

import typer

from effspinenet_lib.cli.console import parse_settings, print_table


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(models)
    app.command()(cost)


def models() -> None:
    """List the models, their input sizes and the tables and figures they stand in.

    `effspinenet cost NAME` counts a model's multi-adds and parameters.
    """
    from effspinenet_lib.zoo import default_image_size, list_models

    rows = [
        (name, default_image_size(name), ", ".join(sorted(items)) or "not in the paper")
        for name, items in list_models().items()
    ]
    print_table("Models", ("name", "input size", "stands in"), rows)


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
    from effspinenet_lib.cost import measure_cost
    from effspinenet_lib.zoo import check_model, create_model, default_image_size

    options = parse_settings(option or [])
    check_model(name, task, options)
    classes = {} if num_classes is None else {"num_classes": num_classes}
    model = create_model(name, task=task, **classes, **options)
    size = image_size or default_image_size(name)
    typer.echo(f"{measure_cost(model, image_size=size)} at {size}x{size}")
