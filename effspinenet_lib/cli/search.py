"""`effspinenet search`: learn the resource distribution, export it, count its space."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effspinenet_lib.cli.console import ResultsDir, pass_down, print_table
from effspinenet_lib.cli.data import Workers
from effspinenet_lib.cli.experiments import AcceleratorName, EngineName
from effspinenet_lib.cli.train import BatchSize, MicroBatch
from effspinenet_lib.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from effspinenet_lib.results import ResultsStore
    from effspinenet_lib.search.search import Runner, SearchSettings

ALL = "all"

Profile = Annotated[
    str,
    typer.Option(
        help="`smoke` (a minute; says nothing about accuracy), `proxy` (hours of one core), or "
        "`paper` (5,000 trials on COCO; needs accelerators)."
    ),
]
Data = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of COCO 2017, for `paper` alone.")
]
Processes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Trials at once. [default: one a core or GPU, of a Ray cluster as many as it has]",
    ),
]

app = typer.Typer(invoke_without_command=True)


@contextmanager
def _runner(
    engine: str,
    store: ResultsStore,
    settings: SearchSettings,
    processes: int | None,
    accelerator: str,
    workers: int,
) -> Iterator[Runner]:
    from functools import partial

    from effspinenet_lib.experiments.launcher import open_pool, run_many
    from effspinenet_lib.experiments.reproduction import resolve_devices
    from effspinenet_lib.training.device import AUTO, CPU

    device, count = resolve_devices(engine, accelerator, processes or AUTO)
    with open_pool(engine, count, device, workers, settings.timeout) as pool:
        whole = settings.micro_batch is None and settings.recipe.scaled_from_batch is None
        if settings.profile == "paper" and pool.device == CPU and whole:
            raise UserError(
                f"a step of a trial has {settings.recipe.batch_size} images, more than a CPU's "
                "memory holds: use an accelerator, or give --micro-batch or --batch-size"
            )
        typer.echo(f"Trials at once: {pool.processes}, each on one {pool.device}", err=True)
        yield partial(
            run_many,
            runs_dir=store.runs_folder,
            pool=pool,
            progress=False,
            micro_batch=settings.micro_batch,
        )


def _store(results_dir: Path | None, profile: str) -> ResultsStore:
    from effspinenet_lib.experiments import default_results_dir
    from effspinenet_lib.results import ResultsStore

    # the processes of a cluster have other working folders
    return ResultsStore((results_dir or default_results_dir()).resolve(), profile)


def _tell_of_a_failure(trials: pd.DataFrame) -> None:
    from effspinenet_lib.search.search import FAILED

    failed = trials[trials["state"] == FAILED]
    if len(failed):
        first = failed.iloc[0]
        typer.echo(
            f"Trial {first['trial']} of {first['method']} with seed {first['seed']} failed: "
            f"{first['note']}",
            err=True,
        )


@app.callback()
def search(
    context: typer.Context,
    profile: Profile = "smoke",
    method: Annotated[
        str, typer.Option(help="`ppo`, `reinforce`, `random`, `evolution`, or `all`.")
    ] = ALL,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Samples of each method. [default: the profile's]")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples and of the trainings.")] = 0,
    data: Data = None,
    batch_size: BatchSize = None,
    micro_batch: MicroBatch = None,
    workers: Workers = 0,
    engine: EngineName = "local",
    accelerator: AcceleratorName = "auto",
    processes: Processes = None,
    penalty: Annotated[
        float,
        typer.Option(help="MnasNet's exponent on Multi-Adds, such as -0.07; 0: none."),
    ] = 0.0,
    results_dir: ResultsDir = None,
    force: Annotated[bool, typer.Option("--force", help="Start again.")] = False,
) -> None:
    """Learn which share of the computation each block gets (section 3.3).

    What is recorded is not run again; what was interrupted resumes. The record is
    `search_trials.csv`.

    For example:

    - `effspinenet search --profile proxy --method ppo`
    - `effspinenet search --profile paper --data coco --micro-batch 64 --workers 8 --engine ray`
    - `effspinenet search export found.json --profile proxy`
    """
    if pass_down(context):
        return
    from effspinenet_lib.search.search import Search, get_search, run_search

    settings = get_search(profile).on(data, batch_size, micro_batch)
    store = _store(results_dir, profile)
    searches = [
        Search(settings, store, name, seed, trials or settings.trials, penalty)
        for name in (settings.methods if method == ALL else (method,))
    ]
    rows = []
    with _runner(engine, store, settings, processes, accelerator, workers) as runner:
        for one in searches:
            record = run_search(one, runner, force=force)
            _tell_of_a_failure(record)
            states = record["state"].value_counts()
            rows.append(
                (
                    one.method,
                    *(int(states.get(s, 0)) for s in ("finished", "duplicate", "failed")),
                    float(record["AP"].max()),
                    float(record["AP"].mean()),
                )
            )
    columns = ("method", "trained", "duplicates", "failed", "best AP", "mean AP")
    print_table(f"Search, profile {profile}", columns, rows)
    typer.echo(f"Record: {store.folder / 'search_trials.csv'}")


@app.command()
def export(
    output: Annotated[Path, typer.Argument(metavar="FOUND.json", help="The file to write.")],
    profile: Profile = "proxy",
    method: Annotated[
        str | None,
        typer.Option(help="Only this method's trials; `paper`: Table 1. [default: the best]"),
    ] = None,
    results_dir: ResultsDir = None,
) -> None:
    """Write the best distribution of a search to a file that stands for a model.

    For example:

    - `effspinenet search export found.json`
    - `effspinenet train --model found.json --data shapescenes --image-size 128`
    """
    from effspinenet_lib.search.export import export_distribution

    found = export_distribution(_store(results_dir, profile), output, method)
    typer.echo(f"{found.name}: betas {' '.join(map(str, found.betas))}")
    typer.echo(f"Feature dimensions at D0: {' '.join(map(str, found.feature_dims))}")
    typer.echo(f"Wrote {output}; use it as a model's name")


@app.command()
def compare(
    profile: Profile = "proxy",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each.")] = 3,
    data: Data = None,
    batch_size: BatchSize = None,
    micro_batch: MicroBatch = None,
    workers: Workers = 0,
    engine: EngineName = "local",
    accelerator: AcceleratorName = "auto",
    processes: Processes = None,
    results_dir: ResultsDir = None,
) -> None:
    """Train SP-EfficientNet's, the paper's and each method's best distribution over several seeds.

    They are trained as the search's trials are and join its record as method `reference`.
    """
    from effspinenet_lib.report.search import references
    from effspinenet_lib.search.export import compared_betas
    from effspinenet_lib.search.search import get_search, run_references

    settings = get_search(profile).on(data, batch_size, micro_batch)
    store = _store(results_dir, profile)
    named = compared_betas(store.trials())
    with _runner(engine, store, settings, processes, accelerator, workers) as runner:
        _tell_of_a_failure(run_references(settings, store, named, range(seeds), runner))
    rows = [
        (name, len(own), float(own["AP"].mean()), float(own["AP"].std()))
        for name, own in references(store.trials()).groupby("row", sort=False)
    ]
    print_table("AP over seeds", ("distribution", "seeds", "mean AP", "deviation"), rows)
    typer.echo("Left out: the runs by which a search chose its best.")


@app.command()
def space(
    samples: Annotated[int, typer.Option(min=1, help="Distributions drawn.")] = 1_000_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    results_dir: ResultsDir = None,
) -> None:
    """Check what the paper says of the space on random distributions; write `search/space.csv`.

    Multi-Adds stay within 10 %, it says, and most samples have fewer parameters.
    """
    from effspinenet_lib.experiments import default_results_dir
    from effspinenet_lib.results import write_datapackage, write_table
    from effspinenet_lib.search.space import CLAIMS_FILE, space_claims

    folder = results_dir or default_results_dir()
    path, rows = folder / CLAIMS_FILE, space_claims(samples, seed)
    write_table(path, "space", rows)
    write_datapackage(folder)
    shown = ("statement", "equation", "stated", "computed", "unit", "verdict")
    print_table(f"{samples} samples", shown, [[str(row[name]) for name in shown] for row in rows])
    typer.echo(f"Wrote {path}")
