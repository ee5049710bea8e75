"""The notebooks as they are committed, and the book that is built from a small checkout."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from pages import cells
from sphinx_external_toc.parsing import parse_toc_yaml

from effspinenet_lib import experiments, publish
from effspinenet_lib.errors import UnknownName, UserError

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
LIVE_PAGES = [
    path
    for path in sorted((REPOSITORY / "book").glob("*.md"))
    if "file_format: mystnb" in path.read_text(encoding="utf-8")
]

# What a notebook takes beside the parameters of all.
OWN_PARAMETERS = {
    "figure_03_distribution": ["distribution"],
    "table_08_learned_distribution": ["distribution"],
}

by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


# The committed notebooks


@by_notebook
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    notebook = read(path)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code_cells(path):
        assert cell.outputs == []
        assert cell.execution_count is None
        compile(cell.source, path.name, "exec")


@by_notebook
def test_the_first_cell_says_the_claim_and_the_check_and_a_cell_the_command(path: Path) -> None:
    text = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    for part in ("# ", "**The paper's claim.**", "**What is done here.**"):
        assert part in text[0]
    assert f"papermill notebooks/{path.name} out.ipynb -p profile " in "\n".join(text)


@by_notebook
def test_every_parameter_is_documented_and_checked_before_anything_else(path: Path) -> None:
    parameters, check = code_cells(path)[:2]
    assert "parameters" in parameters.metadata.tags
    documented = re.findall(r"^(\w+) = .+  # \S.+$", parameters.source, re.MULTILINE)
    common = list(inspect.signature(experiments.resolve_parameters).parameters)
    assert documented == [*common, *OWN_PARAMETERS.get(path.stem, [])]
    assert "resolve_parameters" in check.source
    names: dict[str, Any] = {}
    exec(parameters.source, names)
    names["profile"] = "smokey"
    with pytest.raises(UnknownName, match="smoke"):
        exec(check.source, names)


@by_notebook
def test_a_notebook_ends_with_where_it_comes_from(path: Path) -> None:
    assert f'"{path.stem}"' in code_cells(path)[-1].source


@pytest.mark.parametrize("path", [*NOTEBOOKS, *LIVE_PAGES], ids=lambda path: path.stem)
def test_what_a_page_imports_exists(path: Path) -> None:
    for cell in cells(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("effspinenet_lib"):
                module = importlib.import_module(str(node.module))
                for name in (alias.name for alias in node.names):
                    found = hasattr(module, name) or find_spec(f"{node.module}.{name}")
                    assert found, f"{node.module} has no {name}"


def test_every_item_with_a_notebook_has_it_and_every_notebook_is_in_the_book() -> None:
    named = {item.notebook for item in experiments.ITEMS.values() if item.notebook}
    assert named == {path.stem for path in NOTEBOOKS}
    listed = set(parse_toc_yaml(REPOSITORY / "_toc.yml"))
    assert {f"notebooks/{name}" for name in named} <= listed
    pages = {f"book/{path.stem}" for path in (REPOSITORY / "book").glob("*.md")}
    assert listed == pages | {f"notebooks/{name}" for name in named}


# A small book


INTRO = """\
---
file_format: mystnb
kernelspec:
  name: python3
  display_name: Python 3
---

# Small book

[The other page](../notebooks/page)

```{code-cell} ipython3
:tags: [parameters, remove-cell]

results_dir = ""
```

```{code-cell} ipython3
import os

from IPython.display import HTML

folder = os.environ["EFFSPINENET_BOOK_FILES"]
HTML(f'<p><a href="{folder}/results/proxy/table-08.csv">measured in {results_dir}</a></p>')
```
"""
LAST_CELL = "total = 40 + 2\ntotal"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with two short pages and one measurement."""
    root = tmp_path / "checkout"
    for folder in ("notebooks", "results/proxy"):
        (root / folder).mkdir(parents=True)
    shutil.copy(REPOSITORY / "_config.yml", root)
    (root / "_toc.yml").write_text(
        "format: jb-book\nroot: book/intro\nchapters:\n  - file: notebooks/page\n"
    )
    shutil.copytree(REPOSITORY / "book" / "_static", root / "book" / "_static")
    (root / "book" / "intro.md").write_text(INTRO)
    write_page(root, LAST_CELL)
    (root / "results" / "proxy" / "table-08.csv").write_text("item,row\n")
    monkeypatch.setattr(publish, "CHECKOUT", root)
    monkeypatch.setattr(experiments, "default_results_dir", lambda: root / "results")
    return root


def write_page(root: Path, source: str) -> None:
    page = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# Page"), nbformat.v4.new_code_cell(source)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    page.metadata["language_info"] = {"name": "python"}
    nbformat.write(page, root / "notebooks" / "page.ipynb")


def build(root: Path) -> Path:
    return publish.build_book("smoke", root / "results", root.parent / "output", progress=False)


class Links(HTMLParser):
    """Addresses that a page refers to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("href", "src") and value]


def local_targets(page: Path) -> Iterator[Path]:
    for link in Links(page.read_text(encoding="utf-8")).found:
        parts = urlsplit(link)
        if not parts.scheme and not parts.netloc and parts.path:
            yield page.parent / unquote(parts.path)


def test_the_book_is_built_with_its_files_and_leaves_the_sources_alone(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFSPINENET_REPOSITORY_URL", "https://example.org/repo")
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    index = build(checkout)
    assert index == checkout.parent / "output" / "html" / "index.html"
    after = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    assert after == before

    html = index.parent
    intro = (html / "book" / "intro.html").read_text(encoding="utf-8")
    page = (html / "notebooks" / "page.html").read_text(encoding="utf-8")
    assert f"measured in {checkout / 'results'}" in intro
    assert 'href="https://example.org/repo"' in intro
    assert ">42" in page
    for path in (html / "book" / "intro.html", html / "notebooks" / "page.html"):
        missing = [target for target in local_targets(path) if not target.exists()]
        assert not missing
    assert (html / "files" / "notebooks" / "page.ipynb").read_bytes() == before[
        checkout / "notebooks" / "page.ipynb"
    ]

    # A book that cannot be built leaves the one before.
    (checkout / "book" / "intro.md").write_text("# Small book\n\n[nowhere](nowhere.md)\n")
    with pytest.raises(UserError, match=r"intro\.md.*nowhere"):
        build(checkout)
    assert (html / "book" / "intro.html").read_text(encoding="utf-8") == intro


def test_a_failing_cell_is_named_with_its_page(checkout: Path) -> None:
    write_page(checkout, "raise ValueError('no such thing')")
    (checkout / "book" / "intro.md").write_text("# Small book\n")
    with pytest.raises(UserError, match=r"page\.ipynb: .* ValueError: no such thing"):
        build(checkout)


def test_a_page_that_is_listed_but_missing_is_named(checkout: Path) -> None:
    (checkout / "notebooks" / "page.ipynb").unlink()
    with pytest.raises(UserError, match=r"_toc\.yml lists notebooks/page"):
        build(checkout)


def test_without_a_checkout_the_message_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "CHECKOUT", tmp_path)
    with pytest.raises(UserError, match="clone the repository"):
        publish.build_book("smoke", tmp_path, tmp_path / "output", progress=False)


def test_an_unknown_profile_stops_before_any_page(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="smoke"):
        publish.build_book("smokey", tmp_path, tmp_path / "output", progress=False)
    assert not (tmp_path / "output").exists()
