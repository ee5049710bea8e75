"""Atomic writes, locks between processes, JSON files, the cache folder."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from effspinenet_lib.errors import DataError, UserError

CACHE_VARIABLE = "EFFSPINENET_CACHE"


def cache_folder() -> Path:
    """`$EFFSPINENET_CACHE`, or `~/.cache/effspinenet`."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "effspinenet"


def ensure_folder(
    folder: str | os.PathLike[str], remedy: str = "choose another folder or free it"
) -> Path:
    """Make `folder` if it is missing and check that files can be written there.

    Raises:
        UserError: the folder cannot be made or written; `remedy` says what to do.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write in {path}: {reason}; {remedy}") from error
    return path


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` only when the block succeeds.

    A kill, a full disk or an exception leaves the previous file. Text is UTF-8 with line feeds on
    every platform.

    Raises:
        UserError: the file cannot be written (no space, no permission); `path` is as it was.
    """
    path = Path(path)
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
    temporary: str | None = None
    try:
        descriptor, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
        )
        with os.fdopen(descriptor, mode, encoding=encoding, newline=newline) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write {path}: {reason}; the previous file, if any, is kept"
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of `path` (the file `path.lock`) against other processes."""
    ensure_folder(Path(path).parent)
    with FileLock(f"{path}.lock"):
        yield


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically."""
    with atomic_write(path) as handle:
        json.dump(value, handle, indent=1, sort_keys=True)
        handle.write("\n")


def read_json(
    path: str | os.PathLike[str], hook: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """Read a JSON file; every object in it is replaced by what `hook` returns for it.

    Raises:
        DataError: the file cannot be read or is not JSON; names the file, the line and the column.
    """
    try:
        with open(path, encoding="utf-8-sig") as handle:
            return json.load(handle, object_hook=hook)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: is not JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        ) from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or nested too deeply
        raise DataError(f"{path}: is not JSON ({error})") from error
