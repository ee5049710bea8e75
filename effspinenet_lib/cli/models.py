"""`effspinenet models`, `cost`, `wiring` and `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effspinenet_lib.cli.console import parse_settings, print_table
from effspinenet_lib.errors import UnknownName, UserError

PICTURE_FORMATS = ("svg", "png")
PICTURE_DPI = 150


def models() -> None:
    """List the models, their input size for each task, and the tables that have them.

    `effspinenet cost NAME` counts a model's multi-adds and parameters.
    """
    from effspinenet_lib.models.specs import TASKS
    from effspinenet_lib.models.zoo import list_models, model_entry

    rows = [
        (
            name,
            *(model_entry(name).image_sizes.get(task, "–") for task in TASKS),
            ", ".join(sorted(items)) or "not in the paper",
        )
        for name, items in list_models().items()
    ]
    print_table("Models, with input sizes in pixels", ("name", *TASKS, "tables"), rows)


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
    model = create_model(name, task, num_classes, **options)
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


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT_DIR",
            help="The unpacked archive: a folder with `ckpt-N.index` and its data files.",
        ),
    ],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="`mobile_spinenet_49`, `spinenet_49` and so on.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE.safetensors", help="The weights file to write.")
    ],
    average: Annotated[
        bool,
        typer.Option(
            "--average/--no-average",
            help="Take the moving averages of the weights, if the checkpoint has them.",
        ),
    ] = True,
) -> None:
    """Turn a released TensorFlow checkpoint into weights for this library.

    Needs TensorFlow, in an environment of its own: `pip install -e '.[tensorflow]'`.

    Example: `effspinenet convert spinenet49mobile --model mobile_spinenet_49 --out m.safetensors`
    """
    from effspinenet_lib.files import ensure_folder
    from effspinenet_lib.models import released
    from effspinenet_lib.models.weights import save_weights

    ensure_folder(out.parent)
    state, metadata = released.convert(checkpoint, model, average)
    save_weights(out, state, metadata)
    values = sum(tensor.numel() for tensor in state.values())
    typer.echo(f"Wrote {out}: {model}, {values:,} numbers, every variable used once")
