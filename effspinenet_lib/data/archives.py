"""Unpacking tar and zip files that may be damaged or made to do harm.

Only regular files are written, each below the folder that it is unpacked into; what leads out of
it, a link or a device is refused, and so is more content than the archive is known to have.
"""

from __future__ import annotations

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from tqdm.auto import tqdm

from effspinenet_lib.data.download import file_error
from effspinenet_lib.data.formats import relative_name
from effspinenet_lib.errors import DataError

# Where a member goes, relative to the folder; None: it is not needed.
Place = Callable[[str], str | None]
_COPY_BYTES = 1 << 20


class _Member(NamedTuple):
    name: str
    size: int
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, folder: Path, place: Place, limit: int) -> int:
    """Unpack a tar (compressed or not) or zip file.

    A file that is there already with its size is not written again, so that unpacking goes on
    where it was interrupted.

    Args:
        archive: the file.
        folder: what the members' places are relative to.
        place: says where each member goes.
        limit: bytes that its content may have at most.

    Returns:
        How many of the files were wanted.

    Raises:
        DataError: the archive is damaged, or a member is refused; names it.
        UserError: a file cannot be written, or the disk is full.
    """
    members = _zip_members if archive.suffix == ".zip" else _tar_members
    wanted = 0
    with _readable(archive, folder), tqdm(desc=archive.name, unit="file", disable=None) as bar:
        for member in members(archive):
            limit -= member.size
            if limit < 0:
                raise DataError(f"{archive}: holds more than it should, at {member.name!r:.200}")
            target = place(relative_name(member.name, str(archive)))
            if target is not None:
                wanted += 1
                _write(member, folder / relative_name(target, str(archive)))
            bar.update()
    return wanted


def unpack_nested(archive: Path, folder: Path, place: Place, limit: int) -> int:
    """Unpack a tar file of tar files: `place` is given `<inner archive>/<member>`, no suffix.

    Returns, raises: as `unpack`.
    """
    wanted = 0
    with _readable(archive, folder), tqdm(desc=archive.name, unit="file", disable=None) as bar:
        for outer in _tar_members(archive):
            prefix = relative_name(outer.name, str(archive)).removesuffix(".tar")
            with outer.open() as handle, tarfile.open(fileobj=handle, mode="r:") as inner:
                for member in _members_of(inner, f"{archive}: {outer.name}"):
                    limit -= member.size
                    if limit < 0:
                        raise DataError(f"{archive}: holds more than it should, at {outer.name}")
                    name = relative_name(member.name, f"{archive}: {outer.name}")
                    target = place(f"{prefix}/{name}")
                    if target is not None:
                        wanted += 1
                        _write(member, folder / relative_name(target, str(archive)))
                    bar.update()
    return wanted


@contextmanager
def _readable(archive: Path, folder: Path) -> Iterator[None]:
    """Say in one line what is wrong with an archive."""
    try:
        yield
    # A bare RuntimeError is what `zipfile` has for encrypted members.
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:  # gzip's own has none
            raise file_error(Path(e.filename or folder), e) from e
        reason = str(e).partition("\n")[0]
        raise DataError(
            f"{archive}: is damaged or cut short ({reason}); remove it, fetch anew"
        ) from e


def _tar_members(archive: Path) -> Iterator[_Member]:
    with tarfile.open(archive, "r:*") as tar:
        yield from _members_of(tar, str(archive))


def _members_of(tar: tarfile.TarFile, where: str) -> Iterator[_Member]:
    for entry in tar:
        if entry.isdir():
            continue
        if not entry.isreg():
            raise DataError(f"{where}: {entry.name!r:.200} is a link or a device; not unpacked")

        def opened(entry: tarfile.TarInfo = entry) -> IO[bytes]:
            handle = tar.extractfile(entry)
            assert handle is not None  # it is a regular file
            return handle

        yield _Member(entry.name, entry.size, opened)


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as packed:
        for entry in packed.infolist():
            if entry.is_dir():
                continue
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                raise DataError(
                    f"{archive}: {entry.filename!r:.200} is a link or a device; not unpacked"
                )

            def opened(entry: zipfile.ZipInfo = entry) -> IO[bytes]:
                return packed.open(entry)

            yield _Member(entry.filename, entry.file_size, opened)


def _write(member: _Member, path: Path) -> None:
    if path.is_file() and path.stat().st_size == member.size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with member.open() as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)
    except BaseException:
        path.unlink(missing_ok=True)  # its size may be right, and its content not
        raise
