"""Runs the cells of a page of the book in this process."""

from __future__ import annotations

import ast
import contextlib
import io
from pathlib import Path
from typing import Any

import nbformat
from myst_nb.core.read import read_myst_markdown_notebook

REPOSITORY = Path(__file__).resolve().parents[1]


def cells(path: Path) -> list[Any]:
    """The code cells of a notebook or a page."""
    if path.suffix == ".md":
        notebook = read_myst_markdown_notebook(path.read_text(encoding="utf-8"), path=path)
    else:
        notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(name: str, names: dict[str, Any], chosen: str = "") -> str:
    """Run a page's cells, or those whose id starts with `chosen`; what they show, as text."""
    path, texts = REPOSITORY / name, []
    for cell in cells(path):
        given = "parameters" in cell.metadata.get("tags", []) and not chosen
        if (given and names) or not cell.get("id", "").startswith(chosen):
            continue
        tree = ast.parse(cell.source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as displayed:
            exec(compile(tree, path.name, "exec"), names)
        texts.append(displayed.getvalue())
        if last is not None:
            value = eval(compile(ast.Expression(last.value), path.name, "eval"), names)
            texts.append(repr(value))
    return "\n".join(texts)
