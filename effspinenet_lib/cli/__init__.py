"""The command `effspinenet`.

Each module of this package holds the commands of one subject. They import the library's heavy
modules inside the commands, so that `--help` is fast.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from effspinenet_lib import __version__
from effspinenet_lib.cli import data, experiments, models, search, train
from effspinenet_lib.cli.console import set_up_messages
from effspinenet_lib.errors import Preempted, UserError

INTERRUPTED = 130  # 128 + SIGINT, the shells' convention

app = typer.Typer(
    name="effspinenet",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"effspinenet {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Efficient scale-permuted backbones: their models, their training, their results.

    Start here:

    - `effspinenet models` lists the models
    - `effspinenet cost eff_spinenet_d0` counts one's multi-adds and parameters
    - `effspinenet reproduce all --profile smoke` runs every table and figure once, small
    - `effspinenet book` builds the book from the results

    Exit codes: 0 done, 1 a check found problems, 2 a wrong name or option, 3 an invalid input
    file, 4 weights that do not fit, 5 training that cannot continue, 75 stopped by a signal (the
    same command resumes), 130 interrupted.
    """
    set_up_messages()


for command in (
    *(models.models, models.cost, models.wiring, models.convert),
    *(train.train, train.evaluate, train.detect, train.export, train.card),
    *(experiments.reproduce, experiments.plan, experiments.book),
):
    app.command()(command)
app.add_typer(experiments.results_app, name="results")
app.add_typer(data.app, name="data")
app.add_typer(search.app, name="search")


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    raise Preempted.by(signal.Signals(number).name)


def main() -> None:
    """Run the command line; errors that the user can act on end in one line on stderr."""
    before = signal.signal(signal.SIGTERM, _stop)  # a run that trains ends its step first
    try:
        app(prog_name="effspinenet")
    except (UserError, Preempted) as error:
        for line in error.details:
            print(line, file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:  # such as a full disk, on which not even torch can be imported
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(UserError.exit_code) from None
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            print("interrupted; the same command resumes", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
