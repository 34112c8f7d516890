"""Writing token shards: whole documents, hashed while they are written, visible only when complete.

A shard is `<split>-00000.bin` (little-endian tokens: eos, then each document followed by eos) and `.idx`
(uint64, the offset after each document). Its record, written last, says where in the document list the next
shard begins; a rerun continues from the last record, and the bytes are those of a run that was never
interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bigmodel_jax import atomic
from bigmodel_jax.data.tokenizer import Tokenizer

_BATCH_BYTES = 4 << 20  # text tokenised at once


def token_dtype(vocab_size: int) -> str:
    """Smallest token type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class Spool:
    """The kept text of a corpus in one local file, read back by byte range."""

    def __init__(self, path: str):
        self._file = open(path, "rb")

    def text(self, start: int, end: int) -> str:
        """The text between two byte offsets."""
        self._file.seek(start)
        return self._file.read(end - start).decode()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _Shard:
    """One shard on its way to disk."""

    def __init__(self, folder: str, name: str, dtype: str, eos: int):
        self._folder, self._name, self._type, self._eos = folder, name, np.dtype(dtype).newbyteorder("<"), eos
        self._file = open(os.path.join(folder, f"{name}.bin.tmp"), "wb")
        self._hash = hashlib.sha256()
        self._ends: list[int] = []
        self.tokens, self.bytes = 0, 0
        self._write(np.array([eos]))

    @property
    def documents(self) -> int:
        return len(self._ends)

    def _write(self, ids: np.ndarray) -> None:
        data = ids.astype(self._type).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.tokens += len(ids)

    def add(self, ids: np.ndarray, size: int) -> None:
        self._write(np.append(ids, self._eos))
        self._ends.append(self.tokens)
        self.bytes += size

    def finish(self, record: str, next_document: int) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = os.path.join(self._folder, self._name)
        index = np.array(self._ends, "<u8").tobytes()
        os.replace(f"{path}.bin.tmp", f"{path}.bin")
        atomic.write(f"{path}.idx", index)
        entry = {
            "file": f"{self._name}.bin",
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.bytes,
        }
        entry |= {"sha256": self._hash.hexdigest(), "idx_sha256": hashlib.sha256(index).hexdigest()}
        atomic.write(record, json.dumps({"shard": entry, "next": next_document}).encode())
        return entry

    def abandon(self) -> None:
        self._file.close()


def write_split(
    folder: str,
    work: str,
    split: str,
    ranges: np.ndarray,
    spool: Spool,
    tokenizer: Tokenizer,
    shard_tokens: int,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Tokenise the documents at `ranges` [n, 2] of the spool into shards in `folder`; records go to `work`.

    A shard is closed before the document that would take it past `shard_tokens`. `progress` gets bytes of
    text done. Returns {"shards": [...], "tokens", "documents", "bytes"} as meta.json holds it.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    shards, position = _resume(work, split)
    progress(int((ranges[:position, 1] - ranges[:position, 0]).sum()))
    shard = None
    record = os.path.join(work, split)
    try:
        for number, ids, size in _encoded(ranges, position, spool, tokenizer, progress):
            if shard and shard.documents and shard.tokens + len(ids) + 1 > shard_tokens:
                shards.append(shard.finish(f"{record}-{len(shards):05d}.json", number))
                shard = None
            shard = shard or _Shard(folder, f"{split}-{len(shards):05d}", dtype, tokenizer.eos)
            shard.add(ids, size)
        if shard:
            shards.append(shard.finish(f"{record}-{len(shards):05d}.json", len(ranges)))
            shard = None
    finally:
        if shard:
            shard.abandon()
    return {"shards": shards} | {key: sum(s[key] for s in shards) for key in ("tokens", "documents", "bytes")}


def _resume(work: str, split: str) -> tuple[list[dict[str, Any]], int]:
    shards: list[dict[str, Any]] = []
    position = 0
    while os.path.exists(path := os.path.join(work, f"{split}-{len(shards):05d}.json")):
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        shards.append(record["shard"])
        position = record["next"]
    return shards, position


def _encoded(
    ranges: np.ndarray, position: int, spool: Spool, tokenizer: Tokenizer, progress: Callable[[int], None]
) -> Iterator[tuple[int, np.ndarray, int]]:
    """(number, ids, bytes) of each document from `position` on, tokenised in batches."""
    while position < len(ranges):
        sizes = np.cumsum(np.diff(ranges[position : position + (1 << 16)], axis=1))
        count = max(1, int(np.searchsorted(sizes, _BATCH_BYTES, side="right")))
        batch = ranges[position : position + count]
        texts = [spool.text(int(start), int(end)) for start, end in batch]
        for offset, ids in enumerate(tokenizer.encode_batch(texts)):
            yield position + offset, ids, int(batch[offset, 1] - batch[offset, 0])
        progress(int((batch[:, 1] - batch[:, 0]).sum()))
        position += count
