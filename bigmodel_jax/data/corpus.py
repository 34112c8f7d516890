"""Where text comes from: documents as (name, text), in an order that depends on nothing but the files.

A source is written as one string:

    stdlib            the *.py files of Python's own standard library; `tests=True` adds its test folders
    PATH              a file, folder or glob; a file is a document (.jsonl / .ndjson: a line is one)
    lines:PATH        every non-blank line of the files is a document
    jsonl:PATH        every line is a JSON object whose `field` is a document
    tfds:NAME:SPLIT:FIELD   a TensorFlow data set

Each file may be .gz; PATH may be a URL that fsspec opens (gs://, s3://, memory://). Text is UTF-8. What
cannot be read as such is counted in a `Tally` with examples, or an InputError when `strict`; it never
vanishes silently.
"""

from __future__ import annotations

import dataclasses
import glob
import gzip
import json
import os
import re
import stat
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from bigmodel_jax.data.storage import filesystem, is_url
from bigmodel_jax.errors import InputError, nearest

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})
_EXAMPLES = 5
_TFDS = re.compile(r"([^:]+(?::\d+\.[\d.*]+)?):([^:]+(?:\[.*\])?):([^:\]]+)")  # name:1.0.0:train[:9%]:field


@dataclasses.dataclass
class Tally:
    """Counts of documents by what became of them, with the first few names for each reason."""

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one document under `reason`."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.examples.setdefault(reason, [])
        if len(names) < _EXAMPLES:
            names.append(printable(name))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file of a corpus. `name` is relative to what the user gave, `stamp` changes when the file is
    rewritten.
    """

    name: str
    path: str
    size: int
    stamp: str
    kind: str  # "text", "lines", "jsonl" or "tfds"


def printable(name: str) -> str:
    """A file name as one line of valid UTF-8, whatever bytes it holds."""
    return name if name.isprintable() else ascii(name)


def open_binary(path: str) -> BinaryIO:
    """Open a local file or URL for reading; a missing or unreadable one is an InputError of one line."""
    try:
        if not is_url(path):
            return open(path, "rb")
        system, inner = filesystem(path)
        return system.open(inner, "rb")
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: str, error: Exception) -> InputError:
    """The one-line message for a file that cannot be opened or listed."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return InputError(f"cannot read {printable(path)}: {reason}")


def read_bytes(path: str) -> bytes:
    """Whole content of a local file or URL."""
    with open_binary(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise unreadable(path, error) from None


def list_entries(specs: Sequence[str], *, tests: bool = False) -> list[Entry]:
    """List the files of the sources, in the order their documents come. Reads no content.

    Raises InputError when a source is missing or holds no file.
    """
    entries: list[Entry] = []
    for spec in specs:
        found = _stdlib(tests) if spec == "stdlib" else _listed(spec)
        if not found:
            raise InputError(
                f"source '{printable(spec)}' holds no files; give a file, a folder or a glob that matches some"
            )
        entries += found
    if not entries:
        raise InputError("no source was given; name at least one, for example 'stdlib' or a folder of text files")
    return entries


def _stdlib(tests: bool) -> list[Entry]:
    root = sysconfig.get_paths()["stdlib"]
    leave_out = _NOT_STDLIB if tests else _NOT_STDLIB | TEST_FOLDERS
    return [entry for entry in _walk(root, leave_out, "text") if entry.name.endswith(".py")]


def _listed(spec: str) -> list[Entry]:
    prefix, _, rest = spec.partition(":")
    if prefix == "tfds":
        if not _TFDS.fullmatch(rest):
            raise InputError(
                f"source '{printable(spec)}' should be tfds:NAME:SPLIT:FIELD, for example tfds:lm1b:train:text"
            )
        return [Entry(rest, spec, 0, "", "tfds")]  # TFDS versions its data sets: the name is the identity
    kind, path = (prefix, rest) if prefix in ("lines", "jsonl") and not rest.startswith("//") else ("", spec)
    if not path:
        raise InputError(f"source '{printable(spec)}' names no file")
    if is_url(path):
        return _remote(path, kind)
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return list(_walk(path, frozenset(), kind))
    if os.path.lexists(path):
        return _entry(os.path.basename(path), path, kind)
    if not glob.has_magic(path):
        raise InputError(
            f"source '{printable(spec)}' does not exist" + (nearest(spec, ["stdlib"]) if os.sep not in spec else "")
        )
    matches = sorted(glob.glob(path, recursive=True), key=os.fsencode)
    return [entry for match in matches if not os.path.isdir(match) for entry in _entry(match, match, kind)]


def _walk(root: str, leave_out: frozenset[str], kind: str) -> Iterator[Entry]:
    """Every regular file below `root`, hidden ones left out, ordered by the bytes of its relative path."""

    def failed(error: OSError) -> None:
        raise unreadable(error.filename or root, error)

    found: list[Entry] = []
    for folder, folders, files in os.walk(root, onerror=failed):
        folders[:] = [name for name in folders if name not in leave_out and not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                path = os.path.join(folder, name)
                found += _entry(os.path.relpath(path, root).replace(os.sep, "/"), path, kind)
    return iter(sorted(found, key=lambda entry: os.fsencode(entry.name)))


def _entry(name: str, path: str, kind: str) -> list[Entry]:
    try:
        info = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(info.st_mode):  # opening a named pipe would wait for ever
        return []
    return [Entry(name, path, info.st_size, str(info.st_mtime_ns), kind or _kind(name))]


def _kind(name: str) -> str:
    return "jsonl" if name.removesuffix(".gz").endswith((".jsonl", ".ndjson")) else "text"


def _remote(url: str, kind: str) -> list[Entry]:
    try:
        system, path = filesystem(url)
        if glob.has_magic(path):
            paths = system.glob(path)
        else:
            paths = system.find(path) if system.isdir(path) else [path]
        paths = [p for p in sorted(paths) if not system.isdir(p)]
        return [
            Entry(p, system.unstrip_protocol(p), int(system.size(p) or 0), str(system.ukey(p)), kind or _kind(p))
            for p in paths
        ]
    except OSError as error:
        raise unreadable(url, error) from None


def read_documents(
    entries: Sequence[Entry], *, field: str = "text", strict: bool = False, tally: Tally | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every document, in order.

    Undecodable text, JSON that does not parse and objects without `field` are counted in `tally` under
    "undecodable", "malformed_json" and "no_field"; with `strict` each is an InputError that names the place.
    A damaged .gz is always an InputError: how much of it is lost cannot be known.
    """
    tally = Tally() if tally is None else tally
    for entry in entries:
        if entry.kind == "tfds":
            yield from _tfds(entry, strict, tally)
        else:
            yield from _file(entry, field, strict, tally)


def _file(entry: Entry, field: str, strict: bool, tally: Tally) -> Iterator[tuple[str, str]]:
    try:
        with open_binary(entry.path) as raw:
            file: Any = gzip.GzipFile(fileobj=raw) if entry.path.endswith(".gz") else raw
            if entry.kind == "text":
                text = _decode(file.read(), entry.name, strict, tally)
                if text is not None:
                    yield entry.name, text
                return
            for number, line in enumerate(file, 1):
                name = f"{entry.name}:{number}"
                text = _decode(line.rstrip(b"\r\n"), name, strict, tally)
                if text is not None and entry.kind == "jsonl":
                    text = _json_field(text, field, name, strict, tally)
                if text is not None:
                    yield name, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{printable(entry.path)} is a damaged .gz file ({' '.join(str(error).split())}); copy it again"
        ) from None
    except OSError as error:
        raise unreadable(entry.path, error) from None


def _decode(data: bytes, name: str, strict: bool, tally: Tally) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        _reject(
            "undecodable",
            name,
            f"byte {data[error.start]:#04x} at offset {error.start} is not UTF-8",
            strict,
            tally,
        )
        return None


def _json_field(line: str, field: str, name: str, strict: bool, tally: Tally) -> str | None:
    if not line.strip():
        return ""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        _reject("malformed_json", name, " ".join(str(error).split()), strict, tally)
        return None
    text = value.get(field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        hint = nearest(field, [str(key) for key in value]) if isinstance(value, dict) else ""
        _reject("no_field", name, f"no text under '{field}'{hint}", strict, tally)
        return None
    return _clean(text, name, strict, tally)


def _clean(text: str, name: str, strict: bool, tally: Tally) -> str | None:
    """JSON can spell half of a surrogate pair, which no encoding can write."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        _reject("undecodable", name, f"lone surrogate at character {error.start}", strict, tally)
        return None


def _reject(reason: str, name: str, detail: str, strict: bool, tally: Tally) -> None:
    if strict:
        raise InputError(f"{printable(name)}: {detail}; repair it, or allow such documents to be dropped and counted")
    tally.add(reason, f"{name}: {detail}")


def _tfds(entry: Entry, strict: bool, tally: Tally) -> Iterator[tuple[str, str]]:
    from bigmodel_jax.data.tfds import tfds_documents

    name, split, field = _TFDS.fullmatch(entry.name).groups()
    for position, value in enumerate(tfds_documents(name, split, field)):
        label = f"{entry.name}[{position}]"
        text = _clean(value, label, strict, tally)
        if text is not None:
            yield label, text
