"""What results/parity.json says of each case: with which code and packages its row was made, and which rows are due."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CODE = ("bigmodel_jax/models", "bigmodel_jax/hf", "tests/parity")


def code_hash(root: Path) -> str:
    """Of the code that a row depends on: models, tables of names, references and their comparison."""
    found = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (root / folder).rglob("*.py")):
        found.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:16]


def due(rows: Mapping[str, Any], cases: Iterable[str], made_with: Mapping[str, Any]) -> list[str]:
    """Cases without a row, with one that missed its goal, or with one made with other code or versions."""
    return [name for name in cases if not rows.get(name, {}).get("ok") or rows[name].get("made_with") != made_with]
