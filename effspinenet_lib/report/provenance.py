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

Dir = str | os.PathLike[str]


@dataclass(frozen=True)
class Provenance:
    """Sources of a page; shows itself as links in the book, as paths elsewhere.

    Attributes:
        files: paths of CSVs inside the results folder.
        notebook: path of the notebook inside the repository; "" for none.
        commit: short hash, "+dirty" where files differ from it.
        commands: that make the page's numbers again.
    """

    files: tuple[str, ...]
    notebook: str = ""
    commit: str = ""
    commands: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        files = ", ".join(_link(f"results/{file}") + _warning(file) for file in self.files)
        lines = [f"Notebook: {_link(self.notebook)}"] if self.notebook else []
        lines.append(f"CSV: {files or 'none yet'}")
        lines += [f"Commit: {_commit_link(self.commit)}"] if self.commit else []
        said = f'<p class="esn-provenance">{"<br>".join(lines)}</p>'
        if not self.commands:
            return said
        shown = "<br>".join(f"<code>{escape(command)}</code>" for command in self.commands)
        return f'<p class="esn-provenance">Run it yourself:<br>{shown}</p>{said}'

    def __repr__(self) -> str:
        lines = [f"Notebook: {self.notebook}", f"CSV: {', '.join(self.files)}"]
        return "\n".join([*self.commands, *lines, f"Commit: {self.commit}"])


def provenance(
    item: str, notebook: str, *results_dirs: Dir, also: tuple[str, ...] = ()
) -> Provenance:
    """Collect where an item's page comes from.

    Args:
        item: such as `table-08`.
        notebook: stem of its notebook.
        *results_dirs: results folders; the paper's numbers may lie in another than the measured.
        also: other files that the page shows, those that exist.
    """
    folders = sorted({path for root in results_dirs for path in Path(root).glob("*/")})
    holding = [folder for folder in folders if (folder / f"{item}.csv").is_file()]
    files = [f"{folder.name}/{item}.csv" for folder in holding]
    files += [f"{folder.name}/runs.csv" for folder in holding if (folder / "runs.csv").is_file()]
    files += [file for file in also if any((Path(root) / file).is_file() for root in results_dirs)]
    commands: tuple[str, ...] = (
        f"papermill notebooks/{notebook}.ipynb out.ipynb -p profile proxy",
    )
    if notebook.startswith(item.replace("-", "_")):  # else a page on the numbers of another item
        commands = (f"effspinenet reproduce {item} --profile proxy", *commands)
    path = f"notebooks/{notebook}.ipynb"
    return Provenance(tuple(dict.fromkeys(files)), path, current_commit(), commands)


def result_files(*results_dirs: Dir) -> Provenance:
    """Every CSV of results folders."""
    found = (path for root in results_dirs for path in sorted(Path(root).glob("*/*.csv")))
    return Provenance(tuple(dict.fromkeys(f"{path.parent.name}/{path.name}" for path in found)))


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
