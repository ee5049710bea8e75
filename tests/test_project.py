"""The project's files agree with each other and with what the code imports."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from effspinenet_lib import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parent.parent
LIBRARY = REPOSITORY / "effspinenet_lib"
MODULES = sorted(LIBRARY.rglob("*.py"))
CONDA_NAMES = {"torch": "pytorch"}
CONDA_ONLY = {"python", "pip"}


def _requirements(lines: list[str]) -> dict[str, str]:
    """Package name in lower case -> version range."""
    parsed = [Requirement(line) for line in lines]
    return {
        canonicalize_name(requirement.name): str(requirement.specifier) for requirement in parsed
    }


def _project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def _environment() -> dict:
    return yaml.safe_load((REPOSITORY / "environment.yml").read_text())


def _relative(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_environment_and_pyproject_hold_the_same_packages_and_ranges():
    project = _project()
    pypi = _requirements(project["dependencies"] + project["optional-dependencies"]["dev"])
    expected = {CONDA_NAMES.get(name, name): versions for name, versions in pypi.items()}
    lines = [line for line in _environment()["dependencies"] if isinstance(line, str)]
    conda = _requirements(lines)
    assert {name: v for name, v in conda.items() if name not in CONDA_ONLY} == expected
    assert conda["python"] == project["requires-python"]


def test_environment_installs_this_repository():
    pip_lines = [line["pip"] for line in _environment()["dependencies"] if isinstance(line, dict)]
    assert pip_lines == [["--editable ."]]


def test_every_imported_package_is_a_core_dependency():
    # An engine and a format that are asked for by name, whose message says what to install; and
    # what only runs where torch computes on a TPU by it.
    extras = {"onnxruntime", "onnxscript", "ray", "torch-xla"}
    core = {*_requirements(_project()["dependencies"]), *extras}
    homes = packages_distributions()
    missing = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in {name.split(".")[0] for name in names}:
                if name in sys.stdlib_module_names or name in ("effspinenet_lib", "__future__"):
                    continue
                distributions = {canonicalize_name(found) for found in homes.get(name, [name])}
                if not distributions & core:
                    missing.add((_relative(path), name))
    assert missing == set()


def test_importing_the_library_loads_neither_torch_nor_pandas():
    code = (
        "import sys, effspinenet_lib; effspinenet_lib.__version__; dir(effspinenet_lib); "
        "heavy = {'torch', 'torchvision', 'pandas', 'numpy', 'matplotlib'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_an_unknown_attribute_of_the_library_is_an_attribute_error():
    import effspinenet_lib

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = effspinenet_lib.no_such_name


def test_the_readme_opens_with_the_two_commands_and_names_targets_that_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"(?m)^([a-z-]+):", makefile))
    named = re.findall(r"(?m)^make ([a-z-]+)", _read_guides())
    assert named[:2] == ["reproduce", "test"]
    assert set(named) <= targets


def _read_guides() -> str:
    return "\n".join((REPOSITORY / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))


def _texts() -> dict[str, str]:
    """The guides, the book's pages and the notebooks' text, by file name."""
    pages = [
        path for glob in ("*.md", "book/*.md", "results/*.md") for path in REPOSITORY.glob(glob)
    ]
    texts = {_relative(path): path.read_text() for path in sorted(pages)}
    for path in sorted(REPOSITORY.glob("notebooks/*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        texts[path.name] = "\n".join("".join(cell["source"]) for cell in cells)
    return texts


COMMAND = re.compile(
    r"(?m)^ *(?:\.venv/bin/)?(?:effspinenet|torchrun .*-m effspinenet_lib) (.*?)(?: +#.*)?$"
)
COMMANDS = [
    (name, line)
    for name, text in _texts().items()
    for line in COMMAND.findall(re.sub(r" *(#.*)?\\\n *", " ", text))
]


def test_the_guides_and_the_book_have_commands():
    assert len(COMMANDS) >= 25
    assert {name for name, _ in COMMANDS} >= {"README.md", "book/training.md"}


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_a_command_of_the_guides_is_accepted_by_the_command_line(name: str, line: str):
    command, words = typer.main.get_command(cli.app), shlex.split(line)
    context = command.make_context("effspinenet", words[:], resilient_parsing=True)
    while words and hasattr(command, "resolve_command"):
        found, command, words = command.resolve_command(context, words)
        # An unknown option, a value of the wrong type or a missing argument raises here.
        context = command.make_context(found, words[:], parent=context)
        if hasattr(command, "resolve_command"):  # what its own options leave
            words = [*context._protected_args, *context.args]


def test_the_library_example_of_the_readme_runs():
    (code,) = re.findall(r"(?s)```python\n(.*?)```", (REPOSITORY / "README.md").read_text())
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
    target = {"boxes": boxes, "labels": torch.tensor([3]), "iscrowd": torch.tensor([False])}
    names = {"images": torch.zeros(2, 3, 64, 64), "targets": [target, target]}
    exec(code, names)
    assert set(names["losses"]) == {"classification", "box"}
    assert len(names["found"]) == 2


def test_every_data_file_of_the_package_is_installed_with_it():
    patterns = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    installed = {path for glob in patterns["package-data"]["*"] for path in LIBRARY.rglob(glob)}
    listed = subprocess.run(
        ["git", "ls-files", "effspinenet_lib"], cwd=REPOSITORY, capture_output=True, text=True
    )
    files = {REPOSITORY / name for name in listed.stdout.split()}
    assert {path for path in files if path.suffix != ".py" and path.exists()} == installed & files
