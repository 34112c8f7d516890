"""Small JSON files that a kill at any moment leaves whole, and that several processes may write."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bigmodel_jax import atomic


def write(path: Path, value: Any) -> None:
    atomic.write(path, json.dumps(value, indent=1, default=str) + "\n")


def append(path: Path, value: Any) -> None:
    """One line, whole or not at all; a torn line of a killed writer stays alone on its own."""
    with _locked(path) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        torn = end and file.read(1) != b"\n"
        file.write(b"\n" * bool(torn) + json.dumps(value, allow_nan=False, default=str).encode() + b"\n")


def replace(path: Path, stale: Callable[[dict[str, Any]], bool], value: Any) -> None:
    """One line in place of those that are `stale`; the others stay as they are, also what is appended meanwhile."""
    with _locked(path):
        kept = [line for line in lines(path) if not stale(line)]
        text = [json.dumps(line, allow_nan=False, default=str) + "\n" for line in (*kept, value)]
        atomic.write(path, "".join(text))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file of this name, held alone; not one that was replaced while we waited for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                yield file
                return


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSONL file; none where there is no file."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
