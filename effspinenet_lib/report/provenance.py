"""Where a table or figure comes from: its notebook, its CSVs and the commit."""

from __future__ import annotations

import os
from dataclasses import dataclass
from html import escape
from pathlib import Path

from effspinenet_lib.results import current_commit

# Set by `publish` while it executes the pages of the book: where, seen from a page, the book
# keeps its copies of notebooks and CSVs.
BOOK_FILES_VARIABLE = "EFFSPINENET_BOOK_FILES"
REPOSITORY_VARIABLE = "EFFSPINENET_REPOSITORY_URL"
NOT_YET = "none yet"


@dataclass(frozen=True)
class Provenance:
    """Sources of an item; shows itself as links in the book, as paths elsewhere.

    Attributes:
        notebook: path of the notebook inside the repository.
        files: paths of the CSVs inside the results folder, those that exist.
        commit: short hash, "+dirty" where files differ from it.
    """

    notebook: str
    files: tuple[str, ...]
    commit: str

    def _repr_html_(self) -> str:
        files = ", ".join(_link(f"results/{file}") + _warning(file) for file in self.files)
        files = files or NOT_YET
        return (
            f'<p class="esn-provenance">Notebook: {_link(self.notebook)}<br>CSV: {files}<br>'
            f"Commit: {_commit_link(self.commit)}</p>"
        )

    def __repr__(self) -> str:
        files = ", ".join(self.files) or NOT_YET
        return f"Notebook: {self.notebook}\nCSV: {files}\nCommit: {self.commit}"


def provenance(item: str, notebook: str, *results_dirs: str | os.PathLike[str]) -> Provenance:
    """Collect where an item's page comes from.

    Args:
        item: such as `table-08`.
        notebook: stem of its notebook.
        results_dirs: results folders; the paper's numbers may lie in another than the measured.
    """
    folders = {folder for results in results_dirs for folder in Path(results).glob("*/")}
    holding = sorted(folder for folder in folders if (folder / f"{item}.csv").is_file())
    files = [f"{folder.name}/{item}.csv" for folder in holding]
    files += [f"{folder.name}/runs.csv" for folder in holding if (folder / "runs.csv").is_file()]
    return Provenance(f"notebooks/{notebook}.ipynb", tuple(dict.fromkeys(files)), current_commit())


@dataclass(frozen=True)
class ResultFiles:
    """Every results file; shows itself as links in the book, as paths elsewhere."""

    files: tuple[str, ...]

    def _repr_html_(self) -> str:
        items = "".join(
            f"<li>{_link(f'results/{file}')}{_warning(file)}</li>" for file in self.files
        )
        return f'<ul class="esn-provenance">{items}</ul>'

    def __repr__(self) -> str:
        return "\n".join(self.files)


def result_files(*results_dirs: str | os.PathLike[str]) -> ResultFiles:
    """List the CSVs of results folders, by their paths inside the folder."""
    found = (path for results in results_dirs for path in sorted(Path(results).glob("*/*.csv")))
    return ResultFiles(tuple(dict.fromkeys(f"{path.parent.name}/{path.name}" for path in found)))


def _warning(file: str) -> str:
    return " (smoke: its accuracy is no result)" if file.startswith("smoke/") else ""


def _link(path: str) -> str:
    folder = os.environ.get(BOOK_FILES_VARIABLE)
    shown = f"<code>{escape(path)}</code>"
    return f'<a href="{escape(folder)}/{escape(path)}" download>{shown}</a>' if folder else shown


def _commit_link(commit: str) -> str:
    url = os.environ.get(REPOSITORY_VARIABLE, "").rstrip("/")
    shown = f"<code>{escape(commit)}</code>"
    base = commit.split("+")[0]
    if not url or base == "unknown":
        return shown
    return f'<a href="{escape(url)}/commit/{escape(base)}">{shown}</a>'
