"""Which documents of a corpus are kept and where they go: read and filter, deduplicate, split.

The kept text waits in a spool file, so that a source is read once however slow it is. Memory does not grow
with the
text: 32 bytes per document, and what dedup.py states for near-duplicates.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bigmodel_jax import atomic
from bigmodel_jax.data import dedup
from bigmodel_jax.data.corpus import Entry, Tally, read_documents
from bigmodel_jax.data.filters import Filters, normaliser
from bigmodel_jax.data.shards import Spool
from bigmodel_jax.data.tokenizer import check_settings
from bigmodel_jax.errors import InputError

Progress = Callable[[str, int, int], None]  # stage, done, total (0: not known); bytes, except for "dedup" (documents)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Every setting that determines the content of a prepared directory, inputs apart."""

    tokenizer: str
    vocab_size: int
    pieces: str
    validation_fraction: float
    seed: int
    normalise: str
    field: str
    filters: Filters
    dedup_exact: bool
    near: dedup.MinHash | None
    shard_tokens: int
    strict: bool

    def __post_init__(self) -> None:
        if not 0.0 <= self.validation_fraction < 1.0:
            raise InputError(f"validation_fraction {self.validation_fraction} should be at least 0 and below 1")
        if self.shard_tokens < 1:
            raise InputError(f"shard_tokens {self.shard_tokens} should be at least 1")
        normaliser(self.normalise)
        if not self.tokenizer.startswith("given"):
            check_settings(self.tokenizer, self.vocab_size, self.pieces)


def documents(
    entries: Sequence[Entry], recipe: Recipe, tally: Tally, digest: Any, progress: Progress
) -> Iterator[tuple[str, str]]:
    """Every document as read; `digest` takes in each of them and, at the end, what could not be read."""
    total, done = sum(entry.size for entry in entries), 0
    for name, text in read_documents(entries, field=recipe.field, strict=recipe.strict, tally=tally):
        raw = name.encode("utf-8", "surrogateescape"), text.encode()
        digest.update(b"".join(len(part).to_bytes(8, "little") + part for part in raw))
        yield name, text
        done += len(raw[1])
        progress("read", min(done, total), total)
    digest.update(json.dumps(dataclasses.asdict(tally), sort_keys=True).encode())


def content_hash(entries: Sequence[Entry], recipe: Recipe, progress: Progress) -> str:
    """Hash of everything the sources hold now: what read_into stores as "content"."""
    digest = hashlib.sha256()
    for _ in documents(entries, recipe, Tally(), digest, progress):
        pass
    return digest.hexdigest()


def read_into(work: str, entries: Sequence[Entry], recipe: Recipe, progress: Progress) -> None:
    """Put every document that passes the filters into `work`/spool, its byte range and digest into
    documents.bin [n, 4] uint64.

    read.json, written last, holds the counts, examples and content hash. No document left is an InputError.
    """
    refused, filtered = Tally(), Tally()
    normalise, content = normaliser(recipe.normalise), hashlib.sha256()
    position, kept = 0, 0
    with (
        open(os.path.join(work, "spool"), "wb") as spool,
        open(os.path.join(work, "documents.bin"), "wb") as index,
    ):
        for name, text in documents(entries, recipe, refused, content, progress):
            text = normalise(text)
            reason = recipe.filters.reason(text)
            if reason:
                filtered.add(reason, name)
                continue
            data = text.encode()
            spool.write(data)
            index.write(np.array([position, position + len(data)], "<u8").tobytes() + dedup.digest(text).tobytes())
            position, kept = position + len(data), kept + 1
        for file in (spool, index):
            file.flush()
            os.fsync(file.fileno())
    counts = refused.counts | filtered.counts
    if not kept:
        why = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "the sources hold no document"
        raise InputError(f"no document is left to train on ({why}); give more text or wider filters")
    stage: dict[str, Any] = {
        "read": kept + sum(counts.values()),
        "dropped": counts,
        "content": content.hexdigest(),
    }
    stage["examples"] = refused.examples | filtered.examples
    atomic.write(os.path.join(work, "read.json"), json.dumps(stage).encode())


def deduplicate(
    work: str, documents: np.ndarray, spool: Spool, recipe: Recipe, progress: Progress
) -> tuple[np.ndarray, dict[str, int]]:
    """Positions of the documents to keep [k] int64, ascending, and counts of those dropped."""
    kept, dropped = np.arange(len(documents)), {}
    if recipe.dedup_exact:
        kept = np.flatnonzero(dedup.exact_duplicates(documents[:, 2:]) < 0)
        dropped["exact_duplicate"] = len(documents) - len(kept)
    if recipe.near:
        near, count = recipe.near, len(kept)
        signatures = np.memmap(os.path.join(work, "signatures"), "<u4", "w+", shape=(count, near.permutations))
        for position, (start, end) in enumerate(documents[kept, :2].tolist()):
            signatures[position] = near.signature(spool.text(start, end))
            progress("dedup", position + 1, count)
        kept = kept[dedup.near_duplicates(signatures, near) < 0]
        dropped["near_duplicate"] = count - len(kept)
    return kept, dropped


def split(documents: np.ndarray, recipe: Recipe) -> tuple[np.ndarray, str]:
    """[k] bool, True for validation, from each document's digest alone; and what was moved, in words."""
    seed = dedup.mix64(np.array([recipe.seed % (1 << 64)], np.uint64))
    draws = dedup.mix64(documents[:, 2].astype(np.uint64) ^ seed)
    held_out = draws < np.uint64(recipe.validation_fraction * float(1 << 64))
    if recipe.validation_fraction == 0.0:
        return held_out, ""
    if len(documents) < 2:
        raise InputError(
            "the corpus holds one document, which cannot be both trained on and held out; "
            "use lines:PATH, give more documents, or validation_fraction=0"
        )
    if not held_out.any():
        held_out[draws.argmin()] = True
        return held_out, "one document to validation, which would have been empty"
    if held_out.all():
        held_out[draws.argmax()] = False
        return held_out, "one document to train, which would have been empty"
    return held_out, ""
