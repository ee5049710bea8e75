"""Fixtures that every test can use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Set before any library reads them: no window for plots, nothing from the network, one thread.
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The tests' tensors are small: a second thread gains little, and on a busy machine two threads that
# wait for each other take many times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DATA_VARIABLE = "EFFSPINENET_TEST_DATA"


def _real_data(name: str) -> Path:
    """The folder of a small real data set, or a skip that says where it was looked for."""
    root = Path(os.environ.get(DATA_VARIABLE) or REPOSITORY.parent / "shared" / "data")
    folder = root / name
    if not folder.is_dir():
        pytest.skip(f"the real data set {name} is not at {folder}; set ${DATA_VARIABLE}")
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the ShapeScenes that tests make out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFSPINENET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_coco() -> Path:
    """100 COCO images with instance annotations, crowds included (COCO layout)."""
    return _real_data("tiny_coco")


@pytest.fixture(scope="session")
def bccd() -> Path:
    """364 blood-cell images in VOC layout; two of the boxes are degenerate."""
    return _real_data("bccd")
