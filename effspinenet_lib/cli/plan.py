"""`effspinenet plan`."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any

import typer

from effspinenet_lib.cli.console import print_table

GIBI = 2**30


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(plan)


def plan(
    items: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ITEM...]", help="`table-03` ... [default: the whole paper]"),
    ] = None,
    profile: Annotated[str, typer.Option(help="`smoke`, `proxy` or `paper`.")] = "paper",
    results_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Finished runs. [default: the checkout's results]"),
    ] = None,
    data_root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The data, whose parts may be named anew.")
    ] = None,
    images_per_second: Annotated[
        float | None,
        typer.Option(min=1e-9, help="Training images a second of every run."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Assume a share of this device's figure: `v100`, `a100`, `h100`, `tpu-v3` or "
            "`tpu-v4`. [default: tpu-v3, as the paper]"
        ),
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="So many of them.")] = 1,
) -> None:
    """Say what is still to be trained, and what it takes: images, Multi-Adds, memory, hours.

    Hours rest on what `--images-per-second` or `--device` says; without them on recorded runs of
    the same model, else on an assumption. Memory is for the recipe's batch on one device, with
    activations in float32; losses and work space come on top. A batch that is too large is
    computed in parts with `train --micro-batch`. A row is missing until its recipe's own run is
    finished; one with another `--batch-size` does not count.

    For example:

    - `effspinenet plan`
    - `effspinenet plan table-03 --images-per-second 400`
    - `effspinenet plan table-03 table-05 --device a100 --devices 8`
    """
    from effspinenet_lib.experiments import ITEMS
    from effspinenet_lib.experiments.plan import ASSUMED_SHARE, DEFAULT_DEVICE, Throughput, totals
    from effspinenet_lib.experiments.plan import plan as make_plan

    given = images_per_second is not None or device is not None or devices > 1
    throughput = Throughput(images_per_second, device or DEFAULT_DEVICE, devices)
    planned = make_plan(
        items or tuple(ITEMS),
        profile,
        results_dir,
        data_root,
        throughput=throughput if given else None,
    )
    headings = ("item", "row", "state", "steps", "batch", "images, M", "Multi-Adds, 1e15")
    columns = (*headings, "memory, GiB", "images/s", "from", "hours")
    print_table(
        f"Profile {profile}: {planned['runs'].sum():,} runs are missing",
        columns,
        [_cells(row) for row in planned.to_dict("records")],
    )
    names = {
        "own": "runs of the paper's authors",
        "search": "the search's samples",
        "carried": "runs whose numbers they carried over",
        "all": "all",
    }
    sums = [
        (
            names[str(name)],
            f"{row['runs']:,.0f}",
            f"{row['images'] / 1e6:,.1f}",
            f"{row['multi_adds'] / 1e18:,.2f}",
            f"{row['hours']:,.1f}",
        )
        for name, row in totals(planned).iterrows()
    ]
    print_table("Total", ("", "runs", "images, M", "Multi-Adds, 1e18", "hours"), sums)
    if (planned["throughput"] == "assumed").any():
        typer.echo(
            f"Assumed: {ASSUMED_SHARE:.0%} of the figure that the maker of {throughput.device} "
            f"gives, times {devices}. That is no measurement; --images-per-second states one."
        )


def _cells(row: dict[Hashable, Any]) -> tuple[str, ...]:
    """A run of the plan as the table shows it."""
    steps = f"{row['steps']:,}"
    return (
        row["item"],
        row["row"] if row["seed"] == 0 else f"{row['row']}, seed {row['seed']}",
        row["state"],
        steps if row["runs"] == 1 else f"{row['runs']:,} x {steps}",
        str(row["batch"]),
        f"{row['images'] / 1e6:,.1f}",
        f"{row['multi_adds'] / 1e15:,.1f}",
        f"{row['memory'] / GIBI:,.1f}",
        f"{row['images_per_second']:,.0f}",
        row["throughput"],
        f"{row['hours']:,.1f}",
    )
