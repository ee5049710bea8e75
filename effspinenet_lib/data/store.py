"""Arrays that processes share: made once, kept in the cache, memory-mapped by all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from effspinenet_lib.files import (
    CACHE_VARIABLE,
    atomic_write,
    cache_folder,
    ensure_folder,
    locked,
    read_json,
    write_json,
)

# Part of every key: raise it when what is kept, or how it is read from its source, changes.
STORE_VERSION = 1
# Written last: where it is, the arrays are whole. Holds what is no array.
_FACTS = "facts.json"
_DIGITS = 24  # of a digest in a folder's name

T = TypeVar("T")


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Hold the lock under which `folder` of the cache, or a file in it, is made.

    Raises:
        UserError: the cache cannot be written; names the variable that moves it.
    """
    remedy = f"free it, or set the environment variable {CACHE_VARIABLE} to another folder"
    ensure_folder(folder.parent, remedy)
    with locked(folder.with_name(folder.name + ".making")):
        yield


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


class Shared:
    """Base of frozen dataclasses whose fields are all arrays.

    One that was opened from the cache is pickled as the name of its folder, so that worker
    processes map the same files instead of getting a copy, however they are started.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        folder = self.__dict__.get("_folder")
        return (_mapped, (type(self), folder)) if folder else super().__reduce_ex__(protocol)


def _mapped(kind: type[T], folder: Path) -> T:
    assert is_dataclass(kind)
    arrays = {
        field.name: np.asarray(np.load(_file(folder, field.name), mmap_mode="r"))
        for field in fields(kind)
    }
    value = cast(T, kind(**arrays))
    object.__setattr__(value, "_folder", folder)
    return value


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def stored(
    kind: type[T], key: Sequence[Any], make: Callable[[], tuple[T, dict[str, Any]]]
) -> tuple[T, dict[str, Any]]:
    """An object of arrays from the cache, with the facts kept beside it; made first if missing.

    Args:
        kind: a dataclass derived from `Shared`.
        key: everything that decides what `make` gives, as JSON types.
        make: gives the object and the facts, as JSON types.

    Raises:
        UserError: the cache cannot be written.
    """
    name = hashlib.sha256(json.dumps([STORE_VERSION, *key]).encode()).hexdigest()[:_DIGITS]
    folder = cache_folder() / "annotations" / f"{kind.__name__.lower()}-{name}"
    if not (folder / _FACTS).exists():
        with making(folder):
            if not (folder / _FACTS).exists():
                _write(folder, *make())
    return _mapped(kind, folder), dict(read_json(folder / _FACTS))


def _write(folder: Path, value: Any, facts: dict[str, Any]) -> None:
    ensure_folder(folder)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    for field in fields(value):
        with atomic_write(_file(folder, field.name), "wb") as handle:
            np.save(handle, getattr(value, field.name))
    write_json(folder / _FACTS, facts)
