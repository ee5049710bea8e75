"""`effspinenet reproduce`, `plan`, `book` and `results`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effspinenet_lib.cli.console import (
    FAILED_CHECK,
    ResultsDir,
    given_options,
    option_name,
    pass_down,
    print_table,
)
from effspinenet_lib.cli.data import Workers
from effspinenet_lib.cli.train import (
    BatchSize,
    Checkpoints,
    InitialWeights,
    MaxSteps,
    MicroBatch,
    print_run,
    print_threads,
    take_threads,
)
from effspinenet_lib.errors import UserError

if TYPE_CHECKING:
    from effspinenet_lib.experiments import RunParameters

ALL = "all"
GIBI = 2**30
# Heading -> format of a run of the plan, scaled to the heading's unit.
PLAN_COLUMNS = {
    "item": "{item}",
    "row": "{row}",
    "seed": "{seed}",
    "state": "{state}",
    "runs x steps": "{runs:,} x {steps:,}",
    "batch": "{batch}",
    "images, M": "{images:,.1f}",
    "Multi-Adds, 1e15": "{multi_adds:,.1f}",
    "memory, GiB": "{memory:,.1f}",
    "images/s": "{images_per_second:,.0f}",
    "from": "{throughput}",
    "hours": "{hours:,.1f}",
}
# Kind of a run of the plan -> what its sum is called.
KINDS = {
    "own": "runs of the paper's authors",
    "search": "the search's samples",
    "quoted": "runs whose numbers they quoted",
    "all": "all",
}
# Options of `reproduce` that only a single row takes, and those that it does not take.
ROW_OPTIONS = ("batch_size", "max_steps", "checkpoints", "workers", "initial_weights")
ITEM_OPTIONS = ("accelerator", "devices", "engine")

Profile = Annotated[
    str,
    typer.Option(
        help="How much is trained: `smoke` (minutes; says nothing about accuracy), `proxy` "
        "(hours of a core a table) or `paper` (the paper's settings, for GPUs or TPUs)."
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The paper's data; only the profile `paper` reads it."),
]
AcceleratorName = Annotated[str, typer.Option(help="`auto`, `cpu`, `gpu` or `tpu`.")]
EngineName = Annotated[
    str,
    typer.Option(
        help="`local` processes, or a `ray` cluster, whose machines share the folders of data and "
        "results."
    ),
]
Seeds = Annotated[str | None, typer.Option(metavar="0,1,2", help="[default: the profile's own]")]


def reproduce(
    context: typer.Context,
    items: Annotated[
        list[str],
        typer.Argument(
            metavar="ITEM...", help="`table-08`, `figure-03` ..., or `all`; see `results`."
        ),
    ],
    row: Annotated[
        str | None,
        typer.Option(help="Train this row alone: its label in the table, or its model."),
    ] = None,
    profile: Profile = "smoke",
    results_dir: ResultsDir = None,
    data_root: DataRoot = None,
    seeds: Seeds = None,
    accelerator: AcceleratorName = "auto",
    devices: Annotated[str, typer.Option(metavar="N|auto", help="Runs at the same time.")] = "auto",
    engine: EngineName = "local",
    batch_size: BatchSize = None,
    micro_batch: MicroBatch = None,
    max_steps: MaxSteps = None,
    checkpoints: Checkpoints = None,
    workers: Workers = 0,
    initial_weights: InitialWeights = None,
    force: Annotated[bool, typer.Option("--force", help="Run finished runs again.")] = False,
) -> None:
    """Run what tables and figures of the paper still need and record it.

    A finished run is not run again; an interrupted one resumes from its last checkpoint.

    With `--row` only that row of the item is trained, in this process or in those of `torchrun`. It
    takes `--batch-size`, `--max-steps`, `--checkpoints`, `--workers` and `--initial-weights`; with
    the profile `paper` a CPU takes a batch of 2 with the recipe scaled to it, unless
    `--batch-size` or `--micro-batch` is given. With `--max-steps` the row is labelled with its
    steps.

    For example:

    - `effspinenet reproduce all`
    - `effspinenet reproduce table-09 --profile proxy --seeds 0,1`
    - `effspinenet reproduce table-03 --row eff_spinenet_d2 --profile paper --data-root coco
      --max-steps 3`
    """
    if row is not None:
        take_threads()
    from effspinenet_lib import experiments

    given = given_options(context)
    for name in ROW_OPTIONS if row is None else ITEM_OPTIONS:
        if name in given:
            problem = "needs --row" if row is None else "has no meaning with --row"
            raise UserError(f"{option_name(name)} {problem}")
    chosen = [] if row is not None else _chosen(items)
    parameters = experiments.resolve_parameters(
        profile=profile,
        data_root=data_root,
        results_dir=results_dir,
        accelerator=accelerator,
        devices=devices,
        seeds=seeds,
        engine=engine,
        force=force,
    )
    if row is not None:
        if len(items) != 1:
            raise UserError(f"--row takes one item, {len(items)} were given")
        if initial_weights is not None:
            parameters = replace(parameters, initial_weights=initial_weights.resolve())
        names = ("batch_size", "micro_batch", "max_steps", "checkpoints", "workers")
        options = {name: given[name] for name in names if name in given}
        _train_row(items[0], row, parameters, options)
        return
    rows = []
    for name in chosen:
        item = experiments.get_item(name)
        if not item.rows:
            rows.append((name, item.title, "drawn from the specifications; nothing to run"))
            continue
        typer.echo(f"{name}: {item.title}", err=True)
        began = time.monotonic()
        experiments.reproduce(name, parameters, micro_batch=micro_batch)
        measured = len(parameters.store.measurements(name))
        rows.append((name, item.title, f"{measured} values, {time.monotonic() - began:.0f} s"))
    print_table(f"Profile {profile}", ("item", "title", "done"), rows)
    _print_folder(parameters)


def _chosen(names: list[str]) -> list[str]:
    """The items asked for, in the order asked, each once.

    Raises:
        UnknownName: no such item.
    """
    from effspinenet_lib.experiments import ITEMS, get_item

    chosen: list[str] = []
    for name in names:
        chosen += ITEMS if name == ALL else [get_item(name).id]
    return list(dict.fromkeys(chosen))


def _train_row(name: str, row: str, parameters: RunParameters, options: dict[str, Any]) -> None:
    """Train one row of an item with each seed."""
    from effspinenet_lib import experiments

    item = experiments.get_item(name)
    if not item.rows:
        raise UserError(f"{name} trains nothing; see `effspinenet results`")
    found = experiments.find_row(item, row)
    print_threads()
    for seed in parameters.seeds:
        result = experiments.train_row(item, found, replace(parameters, seeds=(seed,)), **options)
        title = f"{name}, {found.label}, {parameters.profile.name}, seed {seed}"
        print_run(title, found.task, result)
    _print_folder(parameters)


def _print_folder(parameters: RunParameters) -> None:
    typer.echo(f"Results: {parameters.store.folder}")


def plan(
    items: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ITEM...]", help="`table-03` ... [default: the whole paper]"),
    ] = None,
    profile: Annotated[str, typer.Option(help="`smoke`, `proxy` or `paper`.")] = "paper",
    results_dir: ResultsDir = None,
    data_root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The data, if its splits have other names."),
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
    activations in float32; losses and work space are extra. A batch that is too large is
    computed in parts with `reproduce --micro-batch`. A row is missing until its recipe's own run is
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
    scaled = planned.assign(
        images=planned["images"] / 1e6,
        multi_adds=planned["multi_adds"] / 1e15,
        memory=planned["memory"] / GIBI,
    )
    print_table(
        f"Profile {profile}: {planned['runs'].sum():,} runs are missing",
        tuple(PLAN_COLUMNS),
        [
            [
                cell.format(**{str(name): value for name, value in row.items()})
                for cell in PLAN_COLUMNS.values()
            ]
            for row in scaled.to_dict("records")
        ],
    )
    sums = [
        (
            KINDS[str(name)],
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
            f"gives, times {devices}. It is not measured; --images-per-second replaces it."
        )


def book(
    profile: Profile = "smoke",
    results_dir: ResultsDir = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="[default: _build/book in the checkout]"),
    ] = None,
    data_root: DataRoot = None,
    seeds: Seeds = None,
) -> None:
    """Execute the notebooks and build the book from them.

    A page whose results are missing runs what it needs; with finished runs it only draws.
    """
    from effspinenet_lib.publish import build_book

    index = build_book(
        profile=profile,
        results_dir=results_dir,
        output=output,
        data_root=data_root,
        seeds=seeds,
    )
    typer.echo(f"Book: {index}")


results_app = typer.Typer(invoke_without_command=True)


@results_app.callback()
def results(context: typer.Context, results_dir: ResultsDir = None) -> None:
    """List what was measured for each table and figure; `validate` checks the files."""
    if pass_down(context):
        return
    from effspinenet_lib.experiments import default_results_dir, item_status

    status = item_status(results_dir or default_results_dir())
    columns = [name for name in status.columns if name != "notebook"]
    headings = tuple(name.replace("_", " ") for name in columns)
    rows = list(status[columns].itertuples(index=False, name=None))
    print_table("Tables and figures: rows of each kind", headings, rows)


@results_app.command()
def costs(results_dir: ResultsDir = None) -> None:
    """Count every model for every task; write `cost/costs.csv`, print the cells of the paper."""
    from effspinenet_lib.experiments import default_results_dir
    from effspinenet_lib.experiments.cost_table import cost_table
    from effspinenet_lib.results import read_table, write_datapackage, write_table

    folder = results_dir or default_results_dir()
    path = folder / "cost" / "costs.csv"
    write_table(path, "cost", cost_table())
    write_datapackage(folder)
    shown = ("item", "row", "metric", "measured", "authors_count", "printed", "as_printed")
    printed = read_table(path, "cost").dropna(subset="printed")
    table = printed[list(shown)].round(3).astype(str)
    print_table("Costs", shown, table.to_numpy().tolist())
    typer.echo(f"Wrote {path}")


@results_app.command()
def validate(results_dir: ResultsDir = None) -> None:
    """Check every results file against its description (datapackage.json).

    The exit code is 1 if something is wrong.
    """
    from effspinenet_lib.experiments import default_results_dir
    from effspinenet_lib.results import validate as find_problems

    folder = results_dir or default_results_dir()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the results with --results-dir")
    problems = find_problems(folder)
    for problem in problems:
        typer.echo(f"problem: {problem}", err=True)
    if problems:
        raise typer.Exit(FAILED_CHECK)
    typer.echo(f"{folder}: all files agree with their description")
