"""`effspinenet reproduce`, `book` and `results`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from effspinenet_lib.cli.console import FAILED_CHECK, print_table
from effspinenet_lib.errors import UserError

ALL = "all"

Profile = Annotated[
    str,
    typer.Option(
        help="How much is trained: `smoke` (minutes; says nothing about accuracy), `proxy` "
        "(about ten minutes of one core a run) or `paper` (the paper's settings, for GPUs or TPUs)."
    ),
]
ResultsDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where the CSV files are. [default: the checkout's results]"),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The paper's data; only the profile `paper` reads it."),
]
Seeds = Annotated[str | None, typer.Option(metavar="0,1,2", help="[default: the profile's own]")]

results_app = typer.Typer(
    invoke_without_command=True,
    help="List what was measured for each table and figure; `validate` checks the files.",
)


def add_commands(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(reproduce)
    app.command()(book)
    app.add_typer(results_app, name="results")


def reproduce(
    items: Annotated[
        list[str],
        typer.Argument(
            metavar="ITEM...", help="`table-08`, `figure-03` ..., or `all`; see `results`."
        ),
    ],
    profile: Profile = "smoke",
    results_dir: ResultsDir = None,
    data_root: DataRoot = None,
    seeds: Seeds = None,
    accelerator: Annotated[str, typer.Option(help="`auto`, `cpu`, `gpu` or `tpu`.")] = "auto",
    devices: Annotated[str, typer.Option(metavar="N|auto", help="Runs at the same time.")] = "auto",
    micro_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images that a run computes at once; gradients add up to the batch's. "
            "[default: the batch; with the profile `paper` on a processor 2]",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again what is finished.")] = False,
) -> None:
    """Run what tables and figures of the paper still need and record it.

    What is finished is not run again; what was interrupted goes on from its last checkpoint. The
    paper's batches stay whole here; `train --item` can make them smaller.

    For example:

    - `effspinenet reproduce all`
    - `effspinenet reproduce table-09 --profile proxy --seeds 0,1`
    """
    from effspinenet_lib import experiments
    from effspinenet_lib.results import ResultsStore

    chosen = _chosen(items)
    parameters = experiments.check_parameters(
        profile=profile,
        data_root=data_root,
        results_dir=results_dir,
        accelerator=accelerator,
        devices=devices,
        seeds=seeds,
        force=force,
    )
    rows = []
    forced: set[str] = set()
    for name in chosen:
        item = experiments.get_item(name)
        if not item.rows:
            rows.append((name, item.title, "drawn from the specifications; nothing to run"))
            continue
        typer.echo(f"{name}: {item.title}", err=True)
        began = time.monotonic()
        store = experiments.reproduce(name, parameters, forced=forced, micro_batch=micro_batch)
        measured = len(store.measurements(name))
        rows.append((name, item.title, f"{measured} values, {time.monotonic() - began:.0f} s"))
    print_table(f"Profile {profile}", ("item", "title", "done"), rows)
    typer.echo(f"Results: {ResultsStore(parameters.results_dir, profile).folder}")


def _chosen(names: list[str]) -> list[str]:
    """The items asked for, in the order asked, each once.

    Raises:
        UnknownName: no such item.
        UserError: this version does not rebuild the item.
    """
    from effspinenet_lib.experiments import ITEMS, get_item

    rebuilt = [item.id for item in ITEMS.values() if item.notebook is not None]
    chosen: list[str] = []
    for name in names:
        if name != ALL and get_item(name).notebook is None:
            row = next(iter(get_item(name).rows), None)
            hint = f"; one row: `train --item {name} --row {row.model}`" if row else ""
            raise UserError(f"{name} is not rebuilt yet; these are: {', '.join(rebuilt)}{hint}")
        chosen += rebuilt if name == ALL else [name]
    return list(dict.fromkeys(chosen))


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


@results_app.callback()
def results(context: typer.Context, results_dir: ResultsDir = None) -> None:
    """List what was measured for each table and figure; `validate` checks the files."""
    if context.invoked_subcommand is not None:
        return
    from effspinenet_lib.experiments import default_results_dir, item_status

    status = item_status(results_dir or default_results_dir())
    columns = [name for name in status.columns if name != "notebook"]
    rows = [
        (*(row[name] for name in columns), "yes" if row["notebook"] else "not yet")
        for row in status.to_dict("records")
    ]
    headings = [name.replace("_", " ") for name in columns]
    print_table("Tables and figures: rows of each kind", (*headings, "rebuilt"), rows)


@results_app.command()
def costs(results_dir: ResultsDir = None) -> None:
    """Count every model for every task; write `cost/costs.csv`, print the cells of the paper."""
    from effspinenet_lib.experiments import default_results_dir
    from effspinenet_lib.experiments.cost_table import read_cost_table, write_cost_table
    from effspinenet_lib.results import write_datapackage

    folder = results_dir or default_results_dir()
    path = write_cost_table(folder)
    write_datapackage(folder)
    shown = ("item", "row", "metric", "measured", "authors_count", "printed", "as_printed")
    printed = read_cost_table(folder).dropna(subset="printed")
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
