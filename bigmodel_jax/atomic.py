"""A file written in one step: who reads it, after a crash too, finds the old content or the new one.

Standard library only.
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any


def write(path: Any, data: bytes | str) -> None:
    """Replace what is at `path`, a string or an object as `pathlib.Path` (also epath's of a URL)."""
    path = Path(path) if isinstance(path, str) else path
    temporary = path.parent / f".{path.name}.{os.getpid()}"
    with temporary.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # an object store has no descriptor
            os.fsync(file.fileno())  # else the new name may reach the disk before the content
    temporary.replace(path)
