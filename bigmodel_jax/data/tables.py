"""Tables of examples: CSV, TSV, JSONL and plain lines, compressed or not, into columns. Strict: nothing is guessed.

A row that does not fit is an error with its line, never a row that is silently shifted, padded or dropped.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bigmodel_jax.data import packages
from bigmodel_jax.data.storage import is_url, read_bytes
from bigmodel_jax.data.tfds import Tfds
from bigmodel_jax.errors import InputError, nearest

FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "lines"}
_OPEN = {".gz": gzip.decompress, ".bz2": bz2.decompress}
_WIDEST_FIELD = 1 << 27  # characters; the csv module stops at 128 KB otherwise


@dataclass(frozen=True)
class Table:
    """Rows by column.

    columns: {name: values}; of JSONL any JSON value, or None where a row lacks the key.
    lines: the line of its file that each row starts on, from 1. names: the file of each row.
    """

    columns: dict[str, list[Any]]
    lines: list[int]
    names: list[str]

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        """Its place for messages: "FILE line N"."""
        return f"{self.names[row]} line {self.lines[row]}"

    def column(self, name: str) -> list[Any]:
        """Values of one column. Errors: InputError for a missing one, with the nearest name."""
        if name not in self.columns:
            legal = ", ".join(sorted(self.columns))
            files, close = ", ".join(sorted(set(self.names))[:2]), nearest(name, self.columns)
            raise InputError(f"{files}: no column '{name}'{close}; columns: {legal}")
        values = self.columns[name]
        for row, value in enumerate(values):
            if value is None:
                raise InputError(f"{self.where(row)}: no value for '{name}'")
        return values

    def texts(self, name: str) -> list[str]:
        """A column of strings, none of them blank. Errors: InputError with the row's line."""
        values = self.column(name)
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise InputError(f"{self.where(row)}: '{name}' should be text, not {type(value).__name__}")
            if not value.strip():
                raise InputError(f"{self.where(row)}: '{name}' is empty")
        return values

    def take(self, rows: np.ndarray | Sequence[int]) -> Table:
        """The table of these rows, in this order."""
        rows = [int(row) for row in rows]
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Table(columns, [self.lines[r] for r in rows], [self.names[r] for r in rows])


def concatenate(tables: Sequence[Table]) -> Table:
    """All rows, with the columns that any of them has; absent values are None."""
    names = list(dict.fromkeys(name for table in tables for name in table.columns))
    columns = {name: [v for table in tables for v in table.columns.get(name, [None] * len(table))] for name in names}
    return Table(columns, [n for t in tables for n in t.lines], [n for t in tables for n in t.names])


def read(files: str | Sequence[Any], *, quotes: str = "auto") -> Table:
    """Read one file, or several one after the other.

    Args:
      files: a path or URL; "package:NAME==VERSION:MEMBER:SHA256" (see packages.py); "tfds:NAME:SPLIT"; or
        a list of these, where a pair (label, file) adds a column "label" with that value.
      quotes: "auto" (CSV fields may be quoted, TSV fields are taken as they are), "yes", "no".

    Errors: InputError for a file that is missing, empty, not UTF-8 or of another form, with its line.
    """
    if isinstance(files, str):
        return _read_one(files, quotes)
    tables = []
    for item in files:
        label, name = (None, item) if isinstance(item, str) else item
        table = _read_one(name, quotes)
        if label is not None:
            table = Table(table.columns | {"label": [label] * len(table)}, table.lines, table.names)
        tables.append(table)
    if not tables:
        raise InputError("no data files given")
    return concatenate(tables)


def _read_one(name: str, quotes: str) -> Table:
    if name.startswith("tfds:"):
        return _from_tfds(name)
    path = packages.locate(name)
    stem, ending = os.path.splitext(path)
    content = _content(path)
    if ending in _OPEN:
        try:
            content = _OPEN[ending](content)
        except (OSError, EOFError, ValueError) as error:
            raise InputError(f"{path} is not a whole {ending} file ({error})") from error
        ending = os.path.splitext(stem)[1]
    if ending not in FORMATS:
        raise InputError(f"{path}: cannot tell the format from '{ending}'; known: {', '.join(FORMATS)}, also .gz, .bz2")
    text = _decoded(path, content)
    if FORMATS[ending] == "jsonl":
        rows = list(_json_rows(path, text))
    elif FORMATS[ending] == "lines":
        rows = [(n, {"text": line}) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        tabs = FORMATS[ending] == "tsv"
        quoted = quotes == "yes" or (quotes == "auto" and not tabs)
        rows = list(_csv_rows(path, text, "\t" if tabs else ",", quoted))
    if not rows:
        raise InputError(f"{path} has no rows")
    keys = list(dict.fromkeys(key for _, row in rows for key in row))
    columns = {key: [row.get(key) for _, row in rows] for key in keys}
    return Table(columns, [line for line, _ in rows], [os.path.basename(path)] * len(rows))


def _content(path: str) -> bytes:
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        folder = os.path.dirname(path) or "."
        near = [] if is_url(path) or not os.path.isdir(folder) else os.listdir(folder)
        raise InputError(f"no data file '{path}'{nearest(os.path.basename(path), near)}") from None
    except IsADirectoryError:
        raise InputError(f"data file '{path}' is a folder") from None
    if not content:
        raise InputError(f"{path} is empty")
    return content


def _decoded(path: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = content[error.start]
        raise InputError(f"{path} line {line}: byte 0x{byte:02x} is not UTF-8; convert it first") from None


def _json_rows(path: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} line {number}: not JSON ({error.msg} at character {error.pos})") from None
        if not isinstance(row, dict):
            raise InputError(f"{path} line {number}: should be an object, not {type(row).__name__}")
        yield number, row


def _csv_rows(path: str, text: str, comma: str, quoted: bool) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(_WIDEST_FIELD)
    form = {"quoting": csv.QUOTE_MINIMAL} if quoted else {"quoting": csv.QUOTE_NONE, "quotechar": None}
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=comma, strict=True, **form)
    header: list[str] | None = None
    begin = 1
    try:
        for fields in lines:
            number, begin = begin, lines.line_num + 1
            if not fields:
                continue
            if header is None:
                header = _header(path, fields)
                continue
            if len(fields) != len(header):
                raise InputError(f"{path} line {number}: {len(fields)} fields, the header has {len(header)}")
            yield number, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise InputError(f"{path} line {begin}: {error}") from None


def _header(path: str, fields: list[str]) -> list[str]:
    names = [field.strip() for field in fields]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{path} line 1: column '{twice[0]}' is there twice")
    return names


def _from_tfds(name: str) -> Table:
    parts = name.split(":")
    if len(parts) != 3:
        raise InputError(f"'{name}' should read tfds:NAME:SPLIT")
    source = Tfds(parts[1], parts[2])
    columns = {}
    for field, values in source.gather(np.arange(len(source))).items():
        if values.ndim == 1:
            columns[field] = [v.decode() if isinstance(v, bytes) else v for v in values.tolist()]
    return Table(columns, list(range(1, len(source) + 1)), [name] * len(source))


def vocabulary(labels: Sequence[Any], classes: Sequence[str] = ()) -> list[str]:
    """Class names in order: those given, else all found, numbers by value and words by alphabet."""
    if classes:
        return [str(name) for name in classes]
    found = {str(label) for label in labels}
    try:
        return sorted(found, key=float)
    except ValueError:
        return sorted(found)


def label_ids(table: Table, name: str, classes: Sequence[str]) -> np.ndarray:
    """[n] int32 class of each row. Errors: InputError for a label that is none of `classes`."""
    places = {label: index for index, label in enumerate(classes)}
    values = [str(value) for value in table.column(name)]
    for row, value in enumerate(values):
        if value not in places:
            legal = f"{list(classes)[:20]}{nearest(value, places)}"
            raise InputError(f"{table.where(row)}: label '{value}' is not one of {legal}")
    return np.array([places[value] for value in values], np.int32)
