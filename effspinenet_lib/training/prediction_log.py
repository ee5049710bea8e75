"""Predictions written down image by image, so that an interrupted evaluation goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from effspinenet_lib.errors import UserError
from effspinenet_lib.files import ensure_folder


class PredictionLog:
    """A file with a line an image, after a first one that says what is evaluated.

    What a kill leaves of the last line is cut off. A file of another evaluation is started anew.

    Attributes:
        images: images on record, the first ones of the data set.
        records: their predictions.
    """

    def __init__(self, path: Path, key: str) -> None:
        """Open the log for the evaluation named `key`; see `records` for what it holds.

        Raises:
            UserError: the file cannot be written.
        """
        self.path = path
        self.images = 0
        self.records: list[dict[str, Any]] = []
        ensure_folder(path.parent)
        header = (json.dumps({"evaluation": key}) + "\n").encode()
        try:
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            whole = [line for line in lines if line.endswith(b"\n")]
            known = whole if whole[:1] == [header] else [header]
            for line in known[1:]:
                self.records += json.loads(line)
                self.images += 1
            self._handle = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115
            self._handle.truncate(sum(map(len, known)) if known is whole else 0)
            self._handle.seek(0, 2)
            if known is not whole:
                self._handle.write(header)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be written or read ({error}); remove it") from error

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the predictions of the next image.

        Raises:
            UserError: the disk is full; what was written before is kept.
        """
        try:
            self._handle.write(json.dumps(records).encode() + b"\n")
            self._handle.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from error

    def __enter__(self) -> PredictionLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handle.close()
        if kind is None:
            self.path.unlink(missing_ok=True)
