"""Large files over HTTP: gone on with where they broke off, checked, whole or not there."""

from __future__ import annotations

import errno
import hashlib
import http.client
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from effspinenet_lib.data.catalogue import Archive
from effspinenet_lib.errors import DataError, UserError

# Our choices: a server may be silent for so long, and is asked so often in a row without giving
# anything, after a wait that doubles each time.
TIMEOUT_SECONDS = 60.0
ATTEMPTS = 6
FIRST_WAIT_SECONDS = 1.0
PIECE_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


def need_space(folder: Path, needed: int) -> None:
    """Check that `needed` bytes are free where `folder` lies.

    Raises:
        UserError: they are not; says how many are.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; free "
            "some, or choose another folder"
        )


def file_error(path: Path, error: OSError) -> UserError:
    """What to tell when a file of this machine cannot be written or read."""
    full = error.errno in _FULL
    reason = "the disk is full" if full else f"cannot be used ({error.strerror or error})"
    remedy = "free some space" if full else "put that right"
    return UserError(
        f"{path}: {reason}; what is there is kept: {remedy} and run the same command again"
    )


class _Broken(Exception):  # noqa: N818 - it says what happened
    """The server or the way to it failed, which another try may mend."""


@contextmanager
def _network() -> Iterator[None]:
    """Around what only asks the server."""
    try:
        yield
    except (http.client.HTTPException, OSError) as error:  # urllib's are among the latter
        raise _Broken(str(getattr(error, "reason", None) or error)) from error


@contextmanager
def _local(path: Path) -> Iterator[None]:
    """Around what only works on a file: no other try would mend what goes wrong there."""
    try:
        yield
    except OSError as error:
        raise file_error(path, error) from error


def download(archive: Archive, path: Path, source: str | None = None) -> Path:
    """Fetch an archive to `path`, or go on with what `path`.part holds of it.

    Args:
        archive: what to fetch.
        path: where it goes once it is whole and its checksum is right.
        source: URL of a folder that has it too, instead of the publisher's.

    Returns:
        `path`.

    Raises:
        UserError: the file cannot be written, or the URL is none of http or https.
        DataError: the server does not have it, does not answer, or gives another file.
    """
    url = archive.url if source is None else f"{source.rstrip('/')}/{archive.name}"
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url}: only http:// and https:// are fetched from")
    part = path.with_name(path.name + ".part")
    with _local(part):
        if path.exists():
            return path
        with tqdm(
            desc=archive.name, total=archive.size, unit="B", unit_scale=True, disable=None
        ) as bar:
            _fetch(url, archive.size, part, bar)
        try:
            check_archive(archive, part, url)
        except DataError:
            part.unlink()
            raise
        part.replace(path)
    return path


def _fetch(url: str, size: int, part: Path, bar: tqdm) -> None:
    """Bring `part` to `size` bytes, over as many requests as it takes."""
    failures = 0
    while (have := _size(part)) < size:
        bar.n = have
        bar.refresh()
        try:
            _append(url, size, part, have, bar)
            reason = "the connection broke off"
        except _Broken as error:
            _give_up_if_final(error.__cause__, url, part)
            reason = str(error)
        failures = 0 if _size(part) > have else failures + 1
        if failures == ATTEMPTS:
            raise DataError(
                f"{url}: cannot be fetched ({reason}); what is there is kept: the same command "
                "goes on from it"
            )
        if failures:
            time.sleep(FIRST_WAIT_SECONDS * 2 ** (failures - 1))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _append(url: str, size: int, part: Path, have: int, bar: tqdm) -> None:
    """One request for what is missing."""
    request = urllib.request.Request(url, headers={"User-Agent": "effspinenet"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with _network(), urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        begins, total = _span(response)
        if total is not None and total != size:
            raise DataError(f"{url}: the server's file has {total} bytes, {size} are expected")
        if begins not in (0, have):
            raise DataError(f"{url}: asked for byte {have}, the server begins at {begins}")
        bar.n = begins
        # A server that knows no ranges begins anew.
        with _local(part), open(part, "ab" if begins else "wb") as handle:
            while piece := _read(response):
                handle.write(piece)
                bar.update(len(piece))


def _read(response: http.client.HTTPResponse) -> bytes:
    with _network():
        return response.read(PIECE_BYTES)


def _span(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """The byte that an answer begins with, and the bytes of the whole file if it says them."""
    if response.status != http.client.PARTIAL_CONTENT:
        length = response.headers.get("Content-Length")
        return 0, None if length is None else int(length)
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if told is None:
        raise http.client.HTTPException("a part without a Content-Range")
    return int(told[1]), None if told[2] == "*" else int(told[2])


def _give_up_if_final(error: BaseException | None, url: str, part: Path) -> None:
    """Raise what no second try would mend."""
    if not isinstance(error, urllib.error.HTTPError):
        return
    if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
        part.unlink(missing_ok=True)  # it is not of this file
    elif http.client.BAD_REQUEST <= error.code < http.client.INTERNAL_SERVER_ERROR:
        raise DataError(f"{url}: the server says {error.code} {error.reason}") from error


def check_archive(archive: Archive, path: Path, origin: str) -> None:
    """Check size and checksum of a file that should be `archive`.

    Raises:
        DataError: it is another file; says what was expected and found.
        UserError: it cannot be read.
    """
    if (size := path.stat().st_size) != archive.size:
        raise DataError(f"{origin}: has {size} bytes, {archive.size} are expected")
    kind, _, expected = archive.checksum.partition(":")
    digest = hashlib.new(kind, usedforsecurity=False)
    with (
        _local(path),
        open(path, "rb") as handle,
        tqdm(
            desc=f"{archive.name}, checksum",
            total=size,
            unit="B",
            unit_scale=True,
            disable=None,
        ) as bar,
    ):
        while piece := handle.read(PIECE_BYTES):
            digest.update(piece)
            bar.update(len(piece))
    if digest.hexdigest() != expected:
        raise DataError(
            f"{origin}: wrong checksum: {kind} {digest.hexdigest()}, expected {expected} "
            f"({archive.checksum_source}); fetch it again, or from another source"
        )
