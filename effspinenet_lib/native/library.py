"""The C++ of this folder: compiled when it is first needed, kept in the cache, loaded."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from effspinenet_lib.errors import Preempted, UserError
from effspinenet_lib.files import atomic_write, cache_folder, ensure_folder

logger = logging.getLogger(__name__)

COMPILER_VARIABLE = "CXX"
COMPILERS = ("c++", "g++", "clang++")
# No -ffast-math, which changes how the whole process treats the smallest numbers.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-pthread", "-Wno-psabi"),
)
COMPILE_SECONDS = 120  # it takes about 3
PROCESSOR_FACTS = Path("/proc/cpuinfo")
INSTRUCTIONS = ("flags", "Features")  # as x86 and ARM call them there
DIGITS = 24  # of the digest in a file's name
WITHOUT = "torch alone trains, which takes longer on a processor"

_POINTER, _REAL, _SIZE = ctypes.c_void_p, ctypes.c_double, ctypes.c_int64
# Beginnings of the functions' names -> the types of their arguments.
_ARGUMENTS = {
    "forward": [_POINTER] * 7 + [_REAL] * 2 + [_SIZE] * 3,
    "backward": [_POINTER] * 6 + [_SIZE] * 3,
    "scale_backward": [_POINTER] * 5 + [_SIZE] * 4,
    "focal": [_POINTER] * 5 + [_REAL] * 2 + [_SIZE] * 3,
}
_ENDINGS = {
    "forward": ("float32", "float32_swish", "bfloat16", "bfloat16_swish"),
    "backward": ("float32", "float32_swish", "bfloat16", "bfloat16_swish"),
    "scale_backward": ("float32", "bfloat16"),
    "focal": ("float32", "bfloat16"),
}


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled functions, or None where there can be none; the log says why.

    `$CXX` names the compiler; set to nothing, it keeps this library from compiling. What is
    compiled has the instructions of this processor and is kept under their name.
    """
    try:
        command = _compiler()
        if not command:
            logger.info("no C++ compiler: %s", WITHOUT)
            return None
        path = cache_folder() / "native" / f"{_key(command)}.so"
        if not path.exists():
            _compile(command, path)
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # made on a machine with another C library
            _compile(command, path)
            library = ctypes.CDLL(str(path))
    except Preempted:
        raise
    # ValueError: quotes in $CXX; RuntimeError: a user without a home
    except (OSError, UserError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning("the C++ of this library cannot be used: %s (%s)", WITHOUT, said)
        return None
    for start, endings in _ENDINGS.items():
        for ending in endings:
            function = getattr(library, f"{start}_{ending}")
            function.argtypes, function.restype = _ARGUMENTS[start], None
    return library


def _compiler() -> list[str]:
    """The compiler's command; empty where there is none."""
    given = os.environ.get(COMPILER_VARIABLE)
    if given is not None:
        return shlex.split(given)
    return next(([name] for name in COMPILERS if shutil.which(name)), [])


def _key(command: Sequence[str]) -> str:
    """A digest of the sources, the compiler's command, the C library and the processor."""
    libc = platform.libc_ver()
    digest = hashlib.sha256(repr((*command, *FLAGS, platform.machine(), *libc)).encode())
    for path in _files(".h", ".cpp"):
        digest.update(path.read_bytes())
    if PROCESSOR_FACTS.exists():
        lines = PROCESSOR_FACTS.read_text(encoding="utf-8", errors="replace").splitlines()
        known = (line for line in lines if line.startswith(INSTRUCTIONS))
        digest.update(next(known, "").encode())
    else:
        digest.update(platform.platform().encode())
    return digest.hexdigest()[:DIGITS]


def _compile(command: Sequence[str], path: Path) -> None:
    ensure_folder(path.parent)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / path.name
        sources = [str(source) for source in _files(".cpp")]
        subprocess.run(
            [*command, *FLAGS, *sources, "-o", str(made)],
            check=True,
            capture_output=True,
            text=True,
            timeout=COMPILE_SECONDS,
            start_new_session=True,  # a signal to this process and its like is not the compiler's
        )
        with atomic_write(path, "wb") as handle:
            handle.write(made.read_bytes())


def _files(*suffixes: str) -> list[Path]:
    folder = Path(__file__).parent
    return sorted(path for path in folder.iterdir() if path.suffix in suffixes)
