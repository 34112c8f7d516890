"""From a corpus to token shards: read, filter, deduplicate, split, tokenise; once, whatever interrupts it.

Work happens in a hidden folder beside the result and the result appears by one rename, so a prepared
directory is always complete. A rerun after a kill continues from the last finished stage or shard and ends
with the same bytes. A rerun on a complete directory compares the settings and the (name, size, modification
time) of every input file with what the directory was made from, and the sizes of the shards with meta.json,
which takes milliseconds. Where file times differ the content is read and compared. Settings or content that
differ are refused unless `rebuild` is given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigmodel_jax import atomic
from bigmodel_jax.data import dedup
from bigmodel_jax.data.corpus import Entry, list_entries, printable, read_bytes
from bigmodel_jax.data.filters import Filters
from bigmodel_jax.data.published import FOLDER
from bigmodel_jax.data.selection import Progress, Recipe, content_hash, deduplicate, read_into, split
from bigmodel_jax.data.shards import Spool, token_dtype, write_split
from bigmodel_jax.data.storage import is_url
from bigmodel_jax.data.tokenizer import (
    KINDS,
    MODEL_FILE,
    SAMPLE_BYTES,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from bigmodel_jax.errors import InputError, RunError, nearest

VERSION = 1


def prepare(
    source_spec: str | Sequence[str],
    out_dir: str,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 4096,
    pieces: str = "word",
    validation_fraction: float = 0.05,
    seed: int = 0,
    normalise: str = "none",
    field: str = "text",
    tests: bool = False,
    min_characters: int = 1,
    max_characters: int = 0,
    min_printable: float = 0.0,
    min_alphabetic: float = 0.0,
    max_line: int = 0,
    max_repeated_lines: float = 1.0,
    dedup_exact: bool = True,
    dedup_near: bool = False,
    near_threshold: float = 0.8,
    near_ngram: int = 5,
    near_characters: bool = False,
    shard_tokens: int = 1 << 26,
    strict: bool = False,
    rebuild: bool = False,
    progress: Progress | None = None,
    wait_s: float = 3600.0,
) -> dict[str, Any]:
    """Write the token shards of a corpus to `out_dir` and return its meta.json.

    source_spec: one source or several; see bigmodel_jax.data.corpus.
    tokenizer: "bpe", "unigram" or "bytes" to train one on the train split, or the path of one to take (see
        load_tokenizer): a SentencePiece model, a prepared directory, a converted run, a folder with a published
        tokenizer. vocab_size, pieces: see train_tokenizer.
    validation_fraction: share of documents held out, chosen by a hash of their text and `seed`, so that
        adding documents moves none. Where chance leaves a split empty, one document is moved and the report
        says so; a corpus of one document is an InputError. 0 makes no validation split.
    normalise: "none" or "nfc". field: the JSONL field. tests: with "stdlib", read its test folders too.
    min_characters ... max_repeated_lines: see bigmodel_jax.data.filters.Filters.
    dedup_exact, dedup_near: keep the first of equal / similar documents; near_*: see dedup.MinHash.
    shard_tokens: tokens at which a shard is closed. strict: a document that cannot be decoded is an error.
    rebuild: replace a directory that was prepared otherwise.
    progress: called as progress(stage, done, total), total 0 where it is not known; stages "wait" (seconds),
        "read", "tokenizer", "train", "validation" (bytes) and "dedup" (documents).
    wait_s: seconds to wait for another process that prepares the same directory.

    Raises InputError (one line) for what cannot be used: sources, settings, an occupied or unwritable
    `out_dir`; RunError where another process holds the directory for longer than `wait_s`.
    """
    out_dir = os.path.expanduser(os.fspath(out_dir))
    if is_url(out_dir):
        raise InputError(f"cannot prepare into {out_dir}: prepare to a local directory and copy it there")
    filters = Filters(min_characters, max_characters, min_printable, min_alphabetic, max_line, max_repeated_lines)
    near = None
    if dedup_near:
        near = dedup.MinHash(near_ngram, near_threshold, characters=near_characters, seed=seed)
    given = _given_tokenizer(tokenizer)
    if given:
        name = "bytes" if given.kind == "bytes" else f"given {given.fingerprint}"
        tokenizer, vocab_size, pieces = name, given.vocab_size, "word"
    recipe = Recipe(
        tokenizer, vocab_size, pieces, validation_fraction, seed, normalise, field, filters, dedup_exact,
        near, shard_tokens, strict,
    )  # fmt: skip
    specs = [source_spec] if isinstance(source_spec, str) else list(source_spec)
    entries = list_entries(specs, tests=tests)
    job = _Job(os.path.abspath(out_dir), recipe, specs, entries, given, progress or (lambda stage, done, total: None))
    with _readable_errors(out_dir):
        with contextlib.suppress(FileNotFoundError):  # another process is replacing it just now
            if (meta := job.finished(rebuild=rebuild)) is not None:
                return meta
        with _lock(job, wait_s):
            job.recover()
            meta = job.finished(rebuild=rebuild)
            return meta if meta is not None else job.make()


def _given_tokenizer(tokenizer: str) -> Tokenizer | None:
    if tokenizer == "bytes":
        return train_tokenizer((), kind="bytes")
    if tokenizer in KINDS:
        return None
    if not (tokenizer.endswith(".model") or is_url(tokenizer) or os.path.isdir(tokenizer)):
        raise InputError(
            f"tokenizer '{printable(tokenizer)}' is neither one of {', '.join(KINDS)} nor a .model "
            f"file or prepared directory{nearest(tokenizer, KINDS)}"
        )
    return load_tokenizer(tokenizer)


@contextlib.contextmanager
def _readable_errors(out_dir: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = printable(str(error.filename or out_dir))
        raise InputError(
            f"cannot prepare {printable(out_dir)}: {place}: {error.strerror or error}; finished "
            "work is kept for the next run"
        ) from None


@contextlib.contextmanager
def _lock(job: _Job, wait_s: float) -> Iterator[None]:
    """Hold the directory's lock file; the system frees it when the process dies, however it dies."""
    import fcntl

    os.makedirs(os.path.dirname(job.out), exist_ok=True)
    path, started = job.beside("lock"), time.monotonic()
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(handle).st_ino == os.stat(path).st_ino:
                    break
        except BlockingIOError:
            if time.monotonic() - started > wait_s:
                os.close(handle)
                raise RunError(
                    f"another process has been preparing {printable(job.out)} for over {wait_s:g} "
                    "s; end it or choose another directory"
                ) from None
            job.progress("wait", int(time.monotonic() - started), 0)
            time.sleep(0.1)
        os.close(handle)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.close(handle)


@dataclasses.dataclass
class _Job:
    """One directory to prepare: `out`, and the hidden names beside it that only prepare uses."""

    out: str
    recipe: Recipe
    specs: list[str]
    entries: list[Entry]
    given: Tokenizer | None
    progress: Progress

    def __post_init__(self) -> None:
        self.listing = _sha([[entry.name, entry.size, entry.stamp, entry.kind] for entry in self.entries])
        self.settings = json.loads(json.dumps(dataclasses.asdict(self.recipe)))
        self.key = _sha([VERSION, self.settings, self.listing])
        self.partial = self.beside("partial")
        self.work = os.path.join(self.partial, "work")

    def beside(self, what: str) -> str:
        folder, name = os.path.split(self.out)
        return os.path.join(folder, f".{name}.{what}")

    def path(self, name: str) -> str:
        return os.path.join(self.work, name)

    def recover(self) -> None:
        """Undo a replacement that was cut between its two renames."""
        old = self.beside("old")
        if os.path.isdir(old):
            if os.path.exists(self.out):
                shutil.rmtree(old)
            else:
                os.rename(old, self.out)

    def finished(self, rebuild: bool) -> dict[str, Any] | None:
        """meta.json of a directory made from the same settings and inputs; None where one is to be made."""
        where = printable(self.out)
        if not os.path.isdir(self.out):
            if os.path.lexists(self.out):
                raise InputError(f"{where} exists and is not a directory; choose another")
            return None
        if not os.listdir(self.out):
            return None
        if not os.path.exists(os.path.join(self.out, "meta.json")):
            raise InputError(f"{where} is not empty and was not written by prepare; choose another directory")
        meta, problem = _read_meta(self.out)
        problem = problem or self._difference(meta["inputs"])
        if problem:
            if rebuild:
                return None
            raise InputError(f"{where} {problem}; choose another directory, or ask for a rebuild to replace it")
        if meta["inputs"]["listing"] != self.listing:  # same content, newer files
            meta["inputs"]["listing"] = self.listing
            with contextlib.suppress(OSError):  # a shared read-only copy is only slower to recognise
                atomic.write(os.path.join(self.out, "meta.json"), _json(meta))
        return meta

    def _difference(self, made_from: dict[str, Any]) -> str | None:
        was, now = made_from["settings"], self.settings
        changed = [f"{name} {was.get(name)!r} instead of {now[name]!r}" for name in now if was.get(name) != now[name]]
        if changed:
            return "was prepared with " + ", ".join(changed)
        if made_from["listing"] == self.listing:
            return None
        same = made_from["content"] == content_hash(self.entries, self.recipe, self.progress)
        return None if same else "was prepared from other documents than its sources hold now"

    def make(self) -> dict[str, Any]:
        """Run the stages that are not done yet, then publish."""
        key, ready = os.path.join(self.partial, "key"), os.path.join(self.partial, "meta.json")
        if not os.path.exists(key) or read_bytes(key).decode() != self.key:
            if os.path.lexists(self.partial):
                shutil.rmtree(self.partial)
            os.makedirs(self.work)
            atomic.write(key, self.key.encode())
        if not os.path.exists(ready):
            try:
                meta = self._build()
            except InputError:  # the next attempt will be with other settings or inputs
                shutil.rmtree(self.partial, ignore_errors=True)
                raise
            atomic.write(ready, _json(meta))
        return self._publish()

    def _build(self) -> dict[str, Any]:
        if not os.path.exists(self.path("read.json")):
            read_into(self.work, self.entries, self.recipe, self.progress)
        read = json.loads(read_bytes(self.path("read.json")))
        documents = np.fromfile(self.path("documents.bin"), "<u8").reshape(-1, 4)
        with Spool(self.path("spool")) as spool:
            kept, dropped = deduplicate(self.work, documents, spool, self.recipe, self.progress)
            documents = documents[kept]
            held_out, moved = split(documents, self.recipe)
            train, validation = documents[~held_out], documents[held_out]
            tokenizer, sample = self._tokenizer(train, spool)
            splits = {
                name: self._write(name, chosen[:, :2].astype(np.int64), spool, tokenizer)
                for name, chosen in (("train", train), ("validation", validation))
            }
        report = {"read": read["read"], "kept": len(kept), "dropped": read["dropped"] | dropped}
        report |= {"examples": read["examples"], "moved": moved, "tokenizer_sample_bytes": sample}
        return self._meta(tokenizer, splits, report, read["content"])

    def _tokenizer(self, train: np.ndarray, spool: Spool) -> tuple[Tokenizer, int]:
        """The given tokenizer, or one trained on a sample of the train split; and the size of the sample."""
        if self.given:
            place = os.path.join(self.partial, FOLDER) if self.given.kind == "published" else self.partial
            os.makedirs(place, exist_ok=True)
            self.given.save(place)
            return self.given, 0
        ranges = train[:, :2].astype(np.int64)
        sizes = ranges[:, 1] - ranges[:, 0]
        limit = SAMPLE_BYTES[self.recipe.tokenizer]
        order = np.argsort(dedup.mix64(train[:, 2]), kind="stable")
        taken = np.sort(order[np.cumsum(sizes[order]) - sizes[order] < limit])
        sample = int(np.minimum(sizes[taken], limit).sum())
        path = os.path.join(self.partial, MODEL_FILE)
        if not os.path.exists(path):
            self.progress("tokenizer", 0, sample)
            texts = (spool.text(int(start), int(end))[:limit] for start, end in ranges[taken])
            recipe = self.recipe
            train_tokenizer(texts, kind=recipe.tokenizer, vocab_size=recipe.vocab_size, pieces=recipe.pieces).save(
                self.partial
            )
            self.progress("tokenizer", sample, sample)
        return load_tokenizer(path), sample

    def _write(self, split: str, ranges: np.ndarray, spool: Spool, tokenizer: Tokenizer) -> dict[str, Any]:
        total, done = int((ranges[:, 1] - ranges[:, 0]).sum()), [0]

        def advance(size: int) -> None:
            done[0] += size
            self.progress(split, done[0], total)

        limit = self.recipe.shard_tokens
        return write_split(self.partial, self.work, split, ranges, spool, tokenizer, limit, advance)

    def _meta(
        self, tokenizer: Tokenizer, splits: dict[str, Any], report: dict[str, Any], content: str
    ) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "version": VERSION,
            "dtype": token_dtype(tokenizer.vocab_size),
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": {"bytes": "bytes", "published": FOLDER}.get(tokenizer.kind, MODEL_FILE),
            "eos": tokenizer.eos,
            "pad": tokenizer.pad,
            "mask": tokenizer.mask,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "splits": splits,
        }
        meta["fingerprint"] = _sha(meta)
        tokens, size = (sum(part[key] for part in splits.values()) for key in ("tokens", "bytes"))
        meta["report"] = report | {"bytes_per_token": round(size / max(tokens, 1), 4)}
        meta["sources"] = [printable(spec) for spec in self.specs]
        meta["inputs"] = {"settings": self.settings, "listing": self.listing, "content": content}
        return meta

    def _publish(self) -> dict[str, Any]:
        shutil.rmtree(self.work, ignore_errors=True)
        for unfinished in Path(self.partial).glob(".*"):  # of attempts that were killed
            unfinished.unlink()
        old = self.beside("old")
        replaced = os.path.isdir(self.out)
        if replaced:
            os.rename(self.out, old)
        os.rename(self.partial, self.out)
        if replaced:
            shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.out, "key"))
        return json.loads(read_bytes(os.path.join(self.out, "meta.json")))


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_meta(folder: str) -> tuple[dict[str, Any], str | None]:
    """(meta.json, what is wrong with the directory). Shards are judged by their sizes, not read."""
    try:
        meta = json.loads(read_bytes(os.path.join(folder, "meta.json")))
        width = np.dtype(meta["dtype"]).itemsize
        sizes = {}
        for shard in (s for split in meta["splits"].values() for s in split["shards"]):
            sizes[shard["file"]] = shard["tokens"] * width
            sizes[shard["file"].removesuffix(".bin") + ".idx"] = shard["documents"] * 8
        if meta["version"] != VERSION:
            return meta, f"has format version {meta['version']}, this is version {VERSION}"
        _ = meta["inputs"]["settings"], meta["inputs"]["listing"], meta["inputs"]["content"]
    except (ValueError, KeyError, TypeError, AttributeError, InputError):
        return {}, "has a damaged meta.json"
    for name, size in sizes.items():
        path = os.path.join(folder, os.path.basename(name))
        actual = os.path.getsize(path) if os.path.exists(path) else -1
        if actual != size:
            return (
                meta,
                f"lost {name}" if actual < 0 else f"holds {name} with {actual} bytes instead of {size}",
            )
    if meta["tokenizer"] != "bytes" and not os.path.exists(os.path.join(folder, str(meta["tokenizer"]))):
        return meta, f"lost {meta['tokenizer']}"
    return meta, None
