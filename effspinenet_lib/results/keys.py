"""What a number is traced by: the key of its run, the commit and the time."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

KEY_LENGTH = 12  # hex digits: 48 bits, ample for the few thousand runs of a suite
PACKAGE_DIR = Path(__file__).resolve().parents[1]
CODE_FOLDERS = ("effspinenet_lib", "notebooks")
GIT_SECONDS = 20


def run_key(config: Mapping[str, Any]) -> str:
    """Hash a configuration to 12 hex digits.

    Configurations that are equal in Python have equal keys: the order of keys, tuples against
    lists and 1 against 1.0 make no difference.

    Raises:
        TypeError: a value is not representable in JSON.
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(_canonical(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("the keys of a configuration must be strings")
        return {key: _canonical(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def current_commit(package_dir: Path = PACKAGE_DIR) -> str:
    """Name the commit of the code that is running.

    Returns:
        A short hash; with "+dirty" if the library or the notebooks differ from it or hold files
        that it does not; "unknown" where the library does not lie in a git checkout of its own.
    """
    root = package_dir.parent
    top = _git(root, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root.resolve():
        return "unknown"
    commit = _git(root, "rev-parse", "--short=10", "HEAD")
    if not commit:
        return "unknown"
    folders = [name for name in CODE_FOLDERS if (root / name).exists()]
    changes = _git(root, "status", "--porcelain", "--", *folders)
    return f"{commit}+dirty" if changes else commit


def _git(folder: Path, *arguments: str) -> str:
    """Run git in `folder`; an empty text where it fails or is not installed."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def today() -> str:
    """Give the day, UTC, as the `date` columns hold it, for example 2026-01-31."""
    return datetime.now(timezone.utc).date().isoformat()
