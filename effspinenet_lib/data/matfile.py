"""Reads MATLAB's version 5 files: what SBD's label maps and ImageNet's list of classes need.

The format is documented in MathWorks' "MAT-File Format". SciPy reads it too, but is nothing that
the rest of the library needs.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effspinenet_lib.errors import DataError

_HEADER_BYTES = 128
_MATRIX, _COMPRESSED, _UTF8 = 14, 15, 16
_NUMBERS = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
    17: "u2", 18: "u4",
}  # fmt: skip
_CELL, _STRUCT, _CHAR, _SPARSE = 1, 2, 4, 5
# What a matrix's own class number means; its values may be stored in a smaller type.
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4",
            14: "i8", 15: "u8"}  # fmt: skip
# A label map of SBD has less than a megabyte; a file that unpacks to more than this is refused.
_LARGEST_BYTES = 64 * 2**20


class _Element(NamedTuple):
    kind: int
    data: memoryview
    end: int


def read_mat(path: Path) -> dict[str, Any]:
    """The variables of a MAT-file of version 5, by name.

    Returns:
        Numbers as arrays of their shape, texts as `str`, cells and structs as flat lists in
        column order (a struct is a dictionary by field), sparse matrices as None.

    Raises:
        DataError: the file is missing, damaged or of another version.
    """
    try:
        content = path.read_bytes()
        if len(content) < _HEADER_BYTES or content[126:128] not in (b"IM", b"MI"):
            raise ValueError("it is no MAT-file of version 5")
        return _Reader("<" if content[126:128] == b"IM" else ">").variables(content)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, LookupError, ValueError, struct.error, zlib.error, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as a MAT-file ({error})") from error


class _Reader:
    def __init__(self, order: str) -> None:
        self.order = order

    def variables(self, content: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {}
        view, position = memoryview(content), _HEADER_BYTES
        while position + 8 <= len(view):
            element = self.element(view, position)
            position = element.end
            if element.kind == _COMPRESSED:
                unpacker = zlib.decompressobj()
                data = unpacker.decompress(element.data, _LARGEST_BYTES)
                if unpacker.unconsumed_tail:
                    raise ValueError(f"a variable has more than {_LARGEST_BYTES} bytes")
                element = self.element(memoryview(data), 0)
            if element.kind == _MATRIX:
                name, value = self.matrix(element.data)
                found[name] = value
        return found

    def element(self, view: memoryview, position: int) -> _Element:
        """The data element at a position, and where the next begins."""
        kind, size = struct.unpack_from(f"{self.order}II", view, position)
        start = position + 8
        if kind >> 16:  # a small element: type, size and data in 8 bytes
            kind, size = kind & 0xFFFF, kind >> 16
            start, end = position + 4, position + 8
        else:
            end = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > len(view):
            raise ValueError("it ends early")
        return _Element(kind, view[start : start + size], end)

    def elements(self, view: memoryview) -> list[_Element]:
        found, position = [], 0
        while position + 8 <= len(view):
            found.append(self.element(view, position))
            position = found[-1].end
        return found

    def numbers(self, element: _Element) -> np.ndarray:
        if element.kind not in _NUMBERS:
            raise ValueError(f"an element of type {element.kind} where numbers are expected")
        return np.frombuffer(element.data, f"{self.order}{_NUMBERS[element.kind]}")

    def matrix(self, view: memoryview) -> tuple[str, Any]:
        """Name and value of a matrix element."""
        if not len(view):  # an empty cell or field
            return "", np.empty((0, 0))
        flags, dimensions, name, *parts = self.elements(view)
        kind = int(self.numbers(flags)[0]) & 0xFF
        shape = tuple(int(side) for side in self.numbers(dimensions))
        return bytes(name.data).decode("latin-1"), self.value(kind, shape, parts)

    def value(self, kind: int, shape: tuple[int, ...], parts: list[_Element]) -> Any:
        if kind == _CELL:
            return [self.matrix(part.data)[1] for part in parts]
        if kind == _STRUCT:
            return self.records(math.prod(shape), parts)
        if kind == _SPARSE:
            return None
        if kind == _CHAR:
            return self.text(parts[0]) if parts else ""
        if kind not in _CLASSES:
            raise ValueError(f"a matrix of class {kind}, which is not read")
        values = self.numbers(parts[0]).astype(_CLASSES[kind])
        return values.reshape(shape, order="F")

    def text(self, element: _Element) -> str:
        if element.kind == _UTF8:
            return bytes(element.data).decode("utf-8", errors="replace")
        return "".join(map(chr, self.numbers(element).tolist()))

    def records(self, count: int, parts: list[_Element]) -> list[dict[str, Any]]:
        length, texts, *values = parts
        width = int(self.numbers(length)[0])
        names = [
            bytes(texts.data[start : start + width]).split(b"\0")[0].decode("latin-1")
            for start in range(0, len(texts.data), width)
        ]
        if len(values) != count * len(names):
            raise ValueError("a struct lacks some of its fields")
        return [
            {
                name: self.matrix(values[row * len(names) + column].data)[1]
                for column, name in enumerate(names)
            }
            for row in range(count)
        ]
