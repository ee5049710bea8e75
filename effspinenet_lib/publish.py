"""The book: execute its pages with papermill, then build it with Jupyter Book.

Pages are executed in a copy, so that `book/` and `notebooks/` never hold outputs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from pathlib import Path

import nbformat
import papermill
import yaml
from myst_nb.core.read import is_myst_markdown_notebook, read_myst_markdown_notebook
from papermill.exceptions import PapermillExecutionError
from sphinx_external_toc.parsing import parse_toc_yaml
from tqdm.auto import tqdm

from effspinenet_lib import experiments
from effspinenet_lib.errors import UserError
from effspinenet_lib.files import atomic_write, ensure_folder
from effspinenet_lib.report.provenance import BOOK_FILES_VARIABLE, REPOSITORY_VARIABLE

CHECKOUT = Path(__file__).resolve().parent.parent
SOURCES = ("_config.yml", "_toc.yml", "book", "notebooks")
FILES = "files"  # folder of the built book with its copies of notebooks and CSVs
PAGE_ENVIRONMENT = {
    BOOK_FILES_VARIABLE: f"../{FILES}",  # every executed page lies one folder deep
    # The kernel of this Python, should the user's own folder hold one of the same name.
    "JUPYTER_PREFER_ENV_PATH": "1",
    # A page runs single images through models: a second thread gains nothing there. The runs that
    # it starts have one too, as several of them run at once.
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or "1",
}
# Kernels otherwise report every start and end on the terminal; errors of cells are raised.
KERNEL_ARGUMENTS = ["--IPKernelApp.log_level=CRITICAL"]
# The command by way of this Python, whatever the PATH; the package cannot be run with -m.
JUPYTER_BOOK = "from jupyter_book.cli.main import main; main()"
PROBLEM = re.compile(r"WARNING|ERROR|\w*Error: \S")
# Jupyter Book puts live cells from another site on every page, twice, which is an error there.
THEBE = re.compile(
    r"\s*<script>const THEBE_JS_URL.*?</script>"
    r'|\s*<script async="async" src="[^"]*sphinx-thebe\.js[^"]*"></script>'
)
COLOUR_CODE = re.compile(r"\x1b\[[0-9;]*m")
SHOWN_PROBLEMS = 5


def build_book(
    profile: str = "smoke",
    results_dir: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    data_root: str | os.PathLike[str] | None = None,
    seeds: str | None = None,
    progress: bool = True,
) -> Path:
    """Execute every page and build the book; a page runs what its results lack.

    The previous book stays until the new one is complete.

    Args:
        profile: `smoke`, `proxy` or `paper`.
        results_dir: results folder; default the checkout's.
        output: folder for the book; default `_build/book` of the checkout.
        data_root: COCO 2017 folder; only the `paper` profile reads it.
        seeds: such as "0,1"; default the profile's own.
        progress: show a bar in terminals.

    Returns:
        Path of the book's `index.html`.

    Raises:
        UserError: the library is not installed from a checkout, a page fails, or the book has
            warnings; the message names the page or the log.
    """
    parameters = experiments.resolve_parameters(profile, data_root, results_dir, seeds=seeds)
    folder = ensure_folder(output or CHECKOUT / "_build" / "book").resolve()
    source = _stage(folder / "source")
    arguments = {
        "profile": profile,
        "results_dir": str(parameters.results_dir),
        "data_root": str(parameters.data_root or ""),
        "seeds": ",".join(map(str, parameters.seeds)),
    }
    pages = [page for page in _pages(source) if _is_notebook(page)]
    with _environment(PAGE_ENVIRONMENT):
        for page in tqdm(pages, unit="page", disable=None if progress else True):
            _execute(page, arguments)
    built = _run_jupyter_book(source, folder)
    for page in built.rglob("*.html"):
        page.write_text(THEBE.sub("", page.read_text(encoding="utf-8")), encoding="utf-8")
    _copy_files(built / FILES, parameters.results_dir)
    shutil.rmtree(folder / "html", ignore_errors=True)
    shutil.move(built, folder / "html")
    return folder / "html" / "index.html"


def _stage(source: Path) -> Path:
    """Copy the book's sources to a fresh folder and configure the copy."""
    missing = [name for name in SOURCES if not (CHECKOUT / name).exists()]
    if missing:
        raise UserError(
            f"{CHECKOUT} has no {', '.join(missing)}: the book is built from a checkout; clone "
            "the repository and install it with `pip install -e .`"
        )
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    for name in SOURCES:
        if (CHECKOUT / name).is_dir():
            ignored = shutil.ignore_patterns(".ipynb_checkpoints")
            shutil.copytree(CHECKOUT / name, source / name, ignore=ignored)
        else:
            shutil.copy2(CHECKOUT / name, source / name)
    # The stylesheet where Jupyter Book looks for it, the repository's address at the foot.
    shutil.copytree(source / "book" / "_static", source / "_static")
    url = escape(os.environ.get(REPOSITORY_VARIABLE, "").rstrip("/"))
    if url:
        config = yaml.safe_load((source / "_config.yml").read_text(encoding="utf-8"))
        config.setdefault("html", {})["extra_footer"] = f'<p><a href="{url}">{url}</a></p>'
        with atomic_write(source / "_config.yml") as handle:
            yaml.safe_dump(config, handle, sort_keys=False)
    return source


def _pages(source: Path) -> list[Path]:
    """Files of the table of contents, in its order."""
    pages = []
    for name in parse_toc_yaml(source / "_toc.yml"):
        found = [
            path for path in (source / f"{name}.ipynb", source / f"{name}.md") if path.exists()
        ]
        if not found:
            raise UserError(f"_toc.yml lists {name}, which is neither {name}.ipynb nor {name}.md")
        pages.append(found[0])
    return pages


def _is_notebook(page: Path) -> bool:
    return page.suffix == ".ipynb" or is_myst_markdown_notebook(page.read_text(encoding="utf-8"))


def _execute(page: Path, arguments: Mapping[str, str]) -> None:
    """Execute a staged page with those of the arguments that it has a parameter for."""
    target = page.with_suffix(".ipynb")
    if page != target:
        notebook = read_myst_markdown_notebook(page.read_text(encoding="utf-8"), path=page)
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, target)
        page.unlink()
    known = papermill.inspect_notebook(target)
    try:
        executed = papermill.execute_notebook(
            target,
            target,
            {name: value for name, value in arguments.items() if name in known},
            kernel_name="python3",
            progress_bar=False,
            cwd=target.parent,
            extra_arguments=[*KERNEL_ARGUMENTS],
        )
    except PapermillExecutionError as error:
        raise UserError(f"{page.name}: a cell failed with {error.ename}: {error.evalue}") from error
    for cell in executed.cells:
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            cell.metadata["tags"] = [*tags, "remove-cell"]
    nbformat.write(executed, target)


def _run_jupyter_book(source: Path, folder: Path) -> Path:
    """Build the staged book with warnings as errors; the folder of its HTML."""
    work, log = folder / "work", folder / "build.log"
    shutil.rmtree(work, ignore_errors=True)
    command = [sys.executable, "-c", JUPYTER_BOOK, "build", str(source)]
    command += ["--path-output", str(work), "--warningiserror", "--keep-going"]
    with open(log, "w", encoding="utf-8") as handle:
        status = subprocess.run(command, stdout=handle, stderr=subprocess.STDOUT).returncode
    if status:
        lines = COLOUR_CODE.sub("", log.read_text(encoding="utf-8")).splitlines()
        problems = [line.strip() for line in lines if PROBLEM.search(line)][:SHOWN_PROBLEMS]
        raise UserError(f"the book was not built, see {log}: {'; '.join(problems)}")
    return work / "_build" / "html"


def _copy_files(target: Path, results_dir: Path) -> None:
    """Put the notebooks and CSVs that pages link to into the built book."""
    shutil.copytree(CHECKOUT / "notebooks", target / "notebooks")
    for folder in (experiments.default_results_dir(), results_dir):
        for path in sorted(folder.glob("*/*.csv")):
            copy = target / "results" / path.parent.name / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the kernels that are started in the block."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
