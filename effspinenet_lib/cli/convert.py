"""`effspinenet convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(convert)


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
            help="Where the checkpoint has moving averages of the weights, take those.",
        ),
    ] = True,
) -> None:
    """Turn a released TensorFlow checkpoint into weights for this library.

    Needs TensorFlow, in an environment of its own: `pip install 'effspinenet[tensorflow]'`.

    Example: `effspinenet convert spinenet49mobile --model mobile_spinenet_49 --out m.safetensors`
    """
    from effspinenet_lib.files import ensure_folder
    from effspinenet_lib.models.released.convert import convert as convert_checkpoint

    ensure_folder(out.parent)
    values = convert_checkpoint(checkpoint, model, out, average)
    typer.echo(f"Wrote {out}: {model}, {values:,} numbers, every variable used once")
