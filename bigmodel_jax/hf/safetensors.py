"""Safetensors files, read without trust and written without copies.

    u64 little-endian n | n bytes of JSON {name: {dtype, shape, data_offsets}} | data

A header is believed only after every claim in it has been checked against the size of the file: until then
nothing is allocated but the header itself, of bounded size. After that the data is memory-mapped, and a
tensor costs memory when it is read. (The library of the same name maps as well, but knows no bfloat16 in
numpy and checks less of the names; tests hold the two equal on good files, both ways.)

A large model is several files and `model.safetensors.index.json`, which says which tensor is where.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from bigmodel_jax import atomic
from bigmodel_jax.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 16 << 20  # bytes; a header of 16 MiB describes some 150,000 tensors
SHARD_BYTES = 5 * 10**9
_MAX_AXES, _MAX_NAME = 16, 1024
_ALIGN = 8
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "I32": np.int32,
        "U32": np.uint32, "I64": np.int64, "U64": np.uint64, "F16": np.float16, "F32": np.float32,
        "F64": np.float64, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
    }.items()
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a checked header: `start` and `stop` are byte offsets in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class _Refused(ValueError):
    """Why a header is not believed."""


def header(path: str | os.PathLike[str]) -> tuple[dict[str, Entry], dict[str, str]]:
    """({name: Entry}, metadata) of one file. Reads at most MAX_HEADER bytes and maps nothing.

    Raises:
      InputError: no such file, or a claim that does not hold: header longer than the file or the bound, not
        JSON of the right shape, a name twice, unknown dtype, bytes that are not shape x dtype, tensors that
        overlap, leave gaps or do not end where the file does.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            text = _header_text(file, size)
        return _checked(text, 8 + len(text), size)
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror}") from error
    except _Refused as error:
        raise InputError(f"'{_shown(path)}' is not a safetensors file to be trusted: {error}") from error


def _shown(value: Any) -> str:
    return ascii(str(value))[1:-1][:120]


def _header_text(file: Any, size: int) -> bytes:
    if size < 8:
        raise _Refused(f"{size} bytes are too few for a header")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise _Refused(f"its header claims {length} bytes, the bound is {MAX_HEADER}")
    if length > size - 8:
        raise _Refused(f"its header claims {length} bytes, the file has {size}: truncated")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise _Refused("its header does not begin with '{'")
    return text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise _Refused(f"'{_shown(name)}' is given twice")
        out[name] = value
    return out


def _parse(text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except _Refused:
        raise
    except (ValueError, RecursionError) as error:  # also bad UTF-8, and integers of thousands of digits
        raise _Refused(f"not JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(values, dict):
        raise _Refused("not a JSON object")
    return values


def check_name(name: str) -> str | None:
    """Why a tensor name is refused, or None: names reach file names and terminals."""
    if not name or len(name) > _MAX_NAME:
        return f"a name of {len(name)} characters"
    if not name.isprintable():
        return f"the name '{_shown(name)}' holds control characters"
    if "\\" in name or name.startswith("/") or ".." in name.split("/"):
        return f"the name '{_shown(name)}' reads like a path"
    return None


def _checked(text: bytes, base: int, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    raw = _parse(text)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Refused("__metadata__ should map strings to strings")
    entries = {name: _entry(name, value, base, size) for name, value in raw.items()}
    position = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise _Refused(f"'{_shown(name)}' {what}")
        position = entry.stop
    if position != size:
        raise _Refused(f"its tensors end at byte {position}, the file at {size}")
    return entries, metadata


def _naturals(value: Any, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(type(v) is int and 0 <= v < 1 << 62 for v in value)


def _entry(name: str, value: Any, base: int, size: int) -> Entry:
    if problem := check_name(name):
        raise _Refused(problem)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _Refused(f"'{_shown(name)}' should have dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Refused(f"'{_shown(name)}' has dtype '{_shown(dtype)}'; known are {', '.join(DTYPES)}")
    if not _naturals(shape, _MAX_AXES):
        raise _Refused(f"'{_shown(name)}' has no shape of at most {_MAX_AXES} non-negative integers")
    if not _naturals(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Refused(f"'{_shown(name)}' has no data_offsets [start, stop]")
    start, stop = (base + offset for offset in offsets)
    if stop > size:
        raise _Refused(f"'{_shown(name)}' ends at byte {stop}, the file at {size}: truncated")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - start != needed:
        raise _Refused(f"'{_shown(name)}' has {stop - start} bytes, {dtype} {shape} needs {needed}")
    # An empty tensor may claim other sides that no array can have.
    if math.prod(side or 1 for side in shape) * DTYPES[dtype].itemsize >= 1 << 63:
        raise _Refused(f"'{_shown(name)}' has the impossible shape {shape}")
    return Entry(DTYPES[dtype], tuple(shape), start, stop)


@dataclass(frozen=True)
class Tensors:
    """The tensors of a file or folder by name: header facts at once, data when asked for.

    where: {name: (file, Entry)}.
    """

    where: Mapping[str, tuple[Path, Entry]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.where)

    def __len__(self) -> int:
        return len(self.where)

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def shape(self, name: str) -> tuple[int, ...]:
        return self.where[name][1].shape

    def dtype(self, name: str) -> np.dtype:
        return self.where[name][1].dtype

    def read(self, name: str) -> np.ndarray:
        """A read-only view of the mapped file: it takes memory page by page, as it is used."""
        path, entry = self.where[name]
        if entry.stop == entry.start:
            return np.zeros(entry.shape, entry.dtype)
        raw = np.memmap(path, np.uint8, "r", entry.start, (entry.stop - entry.start,))
        return raw.view(np.ndarray).view(entry.dtype).reshape(entry.shape)


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
    """The tensors of a .safetensors file, or of a folder with one or with an index of several.

    Raises:
      InputError: nothing of the kind there (a pickle is never opened), a file that is refused (see `header`),
        or an index that disagrees with its files.
    """
    place = Path(path)
    if place.is_file() and place.suffix == ".safetensors":
        return Tensors({name: (place, entry) for name, entry in header(place)[0].items()})
    if (place / INDEX).is_file():
        return _indexed(place)
    if (place / SINGLE).is_file():
        return open_tensors(place / SINGLE)
    raise InputError(_nothing_there(place))


def _nothing_there(place: Path) -> str:
    if not place.is_dir():
        return f"'{place}' is neither a folder nor a .safetensors file"
    pickles = sorted(p.name for p in place.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickles:
        return (
            f"'{place}' has its weights as a pickle ({pickles[0]}), which can run any program when it is opened and "
            f"is never opened here; save it as {SINGLE} where you trust it"
        )
    return f"'{place}' has no {SINGLE} and no {INDEX}"


def _indexed(folder: Path) -> Tensors:
    index = folder / INDEX
    try:
        if index.stat().st_size > MAX_HEADER:
            raise _Refused(f"more than {MAX_HEADER} bytes")
        files = _parse(index.read_bytes()).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise _Refused("no weight_map")
        for file in files.values():
            plain = isinstance(file, str) and file.isprintable() and not set(file) & set("/\\:")
            if not plain or not file.endswith(".safetensors") or file.startswith("."):
                raise _Refused(f"'{_shown(file)}' is not a plain name of a .safetensors file")
    except _Refused as error:
        raise InputError(f"'{index}' is not an index to be trusted: {error}") from error
    where: dict[str, tuple[Path, Entry]] = {}
    for file in sorted(set(files.values())):
        if not (folder / file).is_file():
            raise InputError(f"'{index}' names {file}, which is not there")
        for name, entry in header(folder / file)[0].items():
            if files.get(name) != file:
                said = f"in {files[name]}" if name in files else "nowhere"
                raise InputError(f"'{index}' has the tensor '{_shown(name)}' {said}, but it is in {file}")
            where[name] = (folder / file, entry)
    if absent := sorted(files.keys() - where.keys()):
        raise InputError(f"'{index}' promises tensors that are in no file: {', '.join(map(_shown, absent[:8]))}")
    return Tensors(where)


Shapes = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


def write_file(
    path: str | os.PathLike[str], shapes: Shapes, read: Callable[[str], np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write the tensors `shapes` in their order; `read(name)` makes each when its turn comes.

    The file appears under its name when it is whole.

    Raises:
      InputError: a name or dtype that the format cannot hold, or an array unlike its announced shape.
    """
    about: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape) in shapes.items():
        if problem := check_name(name):
            raise InputError(f"cannot write '{path}': {problem}")
        if np.dtype(dtype) not in NAMES:
            raise InputError(f"cannot write '{_shown(name)}' of dtype {dtype} to '{path}'")
        stop = position + math.prod(shape) * np.dtype(dtype).itemsize
        about[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(about, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, (dtype, shape) in shapes.items():
                array = np.asarray(read(name), dtype)
                if array.shape != tuple(shape):
                    raise InputError(f"'{_shown(name)}' was to have shape {tuple(shape)}, not {array.shape}")
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(
    folder: str | os.PathLike[str],
    shapes: Shapes,
    read: Callable[[str], np.ndarray],
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write `model.safetensors`, or several files of at most `shard_bytes` with an index; returns their names.

    A tensor larger than that gets a file of its own.
    """
    shards: list[dict[str, Any]] = [{}]
    held = total = 0
    for name, (dtype, shape) in shapes.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if shards[-1] and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = (dtype, shape)
        held, total = held + size, total + size
    place, metadata = Path(folder), {"format": "pt"}
    if len(shards) == 1:
        write_file(place / SINGLE, shards[0], read, metadata)
        return [SINGLE]
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, part in zip(names, shards, strict=True):
        write_file(place / file, part, read, metadata)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, part in zip(names, shards, strict=True) for name in part},
    }
    atomic.write(place / INDEX, json.dumps(index, indent=1) + "\n")
    return [*names, INDEX]
