"""What the commands share: tables on the terminal, messages, `key=value` options."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from effspinenet_lib.errors import UserError

FAILED_CHECK = 1  # exit code of a check that found problems
PIPED_WIDTH = 160  # columns where the output is no terminal, so that no cell is folded


def set_up_messages() -> None:
    """Send the library's log messages and its warnings to stderr, one line each.

    Of several processes (`torchrun`) only the first speaks; the others print errors alone.
    """
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
        logging.basicConfig(format="%(message)s", level=logging.ERROR)
        warnings.simplefilter("ignore")
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that are no UTF-8
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("effspinenet_lib").setLevel(logging.INFO)
    warnings.showwarning = _show_warning


def _show_warning(
    message: Warning | str, category: type[Warning], *_where: Any, **_more: Any
) -> None:
    print(f"warning: {message}", file=sys.stderr)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows as a table on stdout; columns of numbers stand to the right."""
    texts = [[_cell(value) for value in row] for row in rows]
    table = Table()
    for index, column in enumerate(columns):
        numeric = bool(texts) and all(_is_number(row[index]) for row in texts)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in texts:
        table.add_row(*row)
    console = Console(
        width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False, markup=False
    )
    console.print(title)
    console.print(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.1f}"
    return str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("", "–")
    return True


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Read `key=value` texts; values are YAML scalars (`true`, `0.2`, `relu`).

    Raises:
        UserError: a text has no `=`, or its value is not one word or number.
    """
    parsed: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"option {text!r} is not of the form key=value")
        try:
            parsed[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"option {text!r}: the value {value!r} cannot be read") from error
        if not isinstance(parsed[key.strip()], (str, bool, int, float)):
            raise UserError(f"option {text!r}: the value {value!r} is not one word or number")
    return parsed


def print_metrics(title: str, task: str, metrics: dict[str, float]) -> None:
    """Print a task's metrics; one without anything to measure shows as a dash."""
    from effspinenet_lib.training.evaluate import TASK_METRICS

    rows = [(name, metrics[name]) for name in TASK_METRICS[task]]
    print_table(title, ("metric", "value (%)"), rows)
