"""From a corpus to token shards: read, filter, deduplicate, split, tokenise; once, whatever interrupts it.

Work happens in a hidden folder beside the result and the result appears by one rename, so a prepared directory is always
complete. A rerun after a kill continues from the last finished stage or shard and ends with the same bytes. A rerun on a
complete directory compares the settings and the (name, size, modification time) of every input file with what the
directory was made from, and the sizes of the shards with meta.json, which takes milliseconds. Where file times differ
the content is read and compared. Settings or content that differ are refused unless `rebuild` is given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bigmodel_jax.data import dedup
from bigmodel_jax.data.corpus import Entry, Tally, is_url, list_entries, printable, read_bytes, read_documents
from bigmodel_jax.data.filters import Filters, normaliser
from bigmodel_jax.data.shards import Spool, token_dtype, write_file, write_split
from bigmodel_jax.data.tokenizer import KINDS, MODEL_FILE, SAMPLE_BYTES, Tokenizer, load_tokenizer, train_tokenizer
from bigmodel_jax.errors import InputError, nearest

VERSION = 1
SPLITS = ("train", "validation")
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

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return dataclasses.asdict(self)


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
    tokenizer: "bpe", "unigram" or "bytes" to train one on the train split, or the path of a SentencePiece model or of a
        prepared directory to take its tokenizer. vocab_size, pieces: see train_tokenizer.
    validation_fraction: share of documents held out, chosen by a hash of their text and `seed`, so that adding documents
        moves none. Where chance leaves a split empty, one document is moved and the report says so; a corpus of one
        document is an InputError. 0 makes no validation split.
    normalise: "none" or "nfc". field: the JSONL field. tests: with "stdlib", read its test folders too.
    min_characters ... max_repeated_lines: see bigmodel_jax.data.filters.Filters.
    dedup_exact, dedup_near: keep the first of equal / similar documents; near_*: see bigmodel_jax.data.dedup.MinHash.
    shard_tokens: tokens at which a shard is closed. strict: a document that cannot be decoded is an error.
    rebuild: replace a directory that was prepared otherwise.
    progress: called as progress(stage, done, total); stages "wait", "read", "dedup", "tokenizer", "train", "validation".
    wait_s: seconds to wait for another process that prepares the same directory.

    Raises InputError (one line) for what cannot be used: sources, settings, an occupied or unwritable `out_dir`.
    """
    out_dir = os.path.expanduser(os.fspath(out_dir))
    if is_url(out_dir):
        raise InputError(f"cannot prepare into {out_dir}: prepare to a local directory and copy it there")
    filters = Filters(min_characters, max_characters, min_printable, min_alphabetic, max_line, max_repeated_lines)
    near = dedup.MinHash(near_ngram, near_threshold, characters=near_characters, seed=seed) if dedup_near else None
    given = _given_tokenizer(tokenizer)
    if given:
        tokenizer, vocab_size, pieces = f"given {given.fingerprint}", given.vocab_size, ""
    recipe = Recipe(
        tokenizer, vocab_size, pieces, validation_fraction, seed, normalise, field, filters, dedup_exact, near, shard_tokens, strict
    )
    specs = [source_spec] if isinstance(source_spec, str) else list(source_spec)
    entries = list_entries(specs, tests=tests)
    job = _Job(os.path.abspath(out_dir), recipe, specs, entries, given, progress or (lambda stage, done, total: None))
    if (meta := job.finished()) is not None:
        return meta
    with _readable_errors(out_dir), _lock(job, wait_s):
        job.recover()
        found = job.finished(rebuild=rebuild)
        return found if found is not None else job.make()


def _given_tokenizer(tokenizer: str) -> Tokenizer | None:
    if tokenizer == "bytes":
        return train_tokenizer((), kind="bytes")
    if tokenizer in KINDS:
        return None
    if not (tokenizer.endswith(".model") or is_url(tokenizer) or os.path.isdir(tokenizer)):
        raise InputError(
            f"tokenizer '{printable(tokenizer)}' is neither one of {', '.join(KINDS)} nor a .model file or prepared directory{nearest(tokenizer, KINDS)}"
        )
    return load_tokenizer(tokenizer)


@contextlib.contextmanager
def _readable_errors(out_dir: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = printable(str(error.filename or out_dir))
        raise InputError(f"cannot prepare {printable(out_dir)}: {place}: {error.strerror or error}; finished work is kept for the next run") from None


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
                raise InputError(f"another process has been preparing {printable(job.out)} for over {wait_s:g} s; end it or choose another directory") from None
            job.progress("wait", int(time.monotonic() - started), 0)
            time.sleep(0.1)
        os.close(handle)
    try:
        yield
    finally:
        os.unlink(path)
        os.close(handle)


@dataclasses.dataclass
class _Job:
    out: str
    recipe: Recipe
    specs: list[str]
    entries: list[Entry]
    given: Tokenizer | None
    progress: Progress

    def __post_init__(self) -> None:
        listing = [[entry.name, entry.size, entry.stamp, entry.kind] for entry in self.entries]
        self.listing = _sha(listing)
        self.settings = json.loads(json.dumps(self.recipe.as_dict()))
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

    def finished(self, rebuild: bool = False) -> dict[str, Any] | None:
        """meta.json of a directory made from the same settings and inputs; None if there is none and it may be made."""
        if not os.path.isdir(self.out) or not os.listdir(self.out):
            if os.path.lexists(self.out) and not os.path.isdir(self.out):
                raise InputError(f"{printable(self.out)} exists and is not a directory; choose another")
            return None
        where = printable(self.out)
        if not os.path.exists(os.path.join(self.out, "meta.json")):
            raise InputError(f"{where} is not empty and was not written by prepare; choose another directory")
        meta, problem = _read_meta(self.out)
        if problem is None:
            made_from = meta["inputs"]
            changed = [name for name, value in self.settings.items() if made_from["settings"].get(name) != value]
            if changed:
                was = {name: made_from["settings"].get(name) for name in changed}
                problem = "was prepared with " + ", ".join(f"{name} {was[name]!r} instead of {self.settings[name]!r}" for name in changed)
            elif made_from["listing"] != self.listing and made_from["content"] != self.content():
                problem = "was prepared from other documents than its sources hold now"
        if problem is None:
            if meta["inputs"]["listing"] != self.listing:
                meta["inputs"]["listing"] = self.listing
                with contextlib.suppress(OSError):  # a shared read-only copy stays usable, only slower to recognise
                    write_file(os.path.join(self.out, "meta.json"), _json(meta))
            return meta
        if not rebuild:
            raise InputError(f"{where} {problem}; choose another directory, or ask for a rebuild to replace it")
        return None

    def documents(self, tally: Tally, digest: Any) -> Iterator[tuple[str, str]]:
        """Every document as read; `digest` takes in each of them and, at the end, what could not be read."""
        total, done = sum(entry.size for entry in self.entries), 0
        for name, text in read_documents(self.entries, field=self.recipe.field, strict=self.recipe.strict, tally=tally):
            raw = name.encode("utf-8", "surrogateescape"), text.encode()
            digest.update(b"".join(len(part).to_bytes(8, "little") + part for part in raw))
            yield name, text
            done += len(raw[1])
            self.progress("read", min(done, total), total)
        digest.update(_json(dataclasses.asdict(tally)))

    def content(self) -> str:
        """Hash of everything the sources hold now."""
        digest = hashlib.sha256()
        for _ in self.documents(Tally(), digest):
            pass
        return digest.hexdigest()

    def make(self) -> dict[str, Any]:
        """Run the stages that are not done yet, then publish."""
        if not self._same_job():
            shutil.rmtree(self.partial, ignore_errors=True)
            os.makedirs(self.work)
            write_file(os.path.join(self.partial, "key"), self.key.encode())
        ready = os.path.join(self.partial, "meta.json")
        if not os.path.exists(ready):
            write_file(ready, _json(self._build()))
        return self._publish()

    def _same_job(self) -> bool:
        try:
            return read_bytes(os.path.join(self.partial, "key")).decode() == self.key
        except InputError:
            return False

    def _build(self) -> dict[str, Any]:
        if not os.path.exists(self.path("read.json")):
            _read(self)
        with open(self.path("read.json"), encoding="utf-8") as file:
            read = json.load(file)
        documents = np.fromfile(self.path("documents.bin"), "<u8").reshape(-1, 4)
        spool = Spool(self.path("spool"))
        try:
            kept, dropped = _deduplicate(self, documents, spool)
            held_out, moved = _split(documents[kept], self.recipe)
            ranges = dict(zip(SPLITS, (documents[kept][~held_out, :2].astype(np.int64), documents[kept][held_out, :2].astype(np.int64))))
            tokenizer, sample = self._tokenizer(ranges["train"], documents[kept][~held_out, 2], spool)
            splits = {name: self._write(name, ranges[name], spool, tokenizer) for name in SPLITS}
        finally:
            spool.close()
        report = {
            "read": read["read"], "kept": int(len(kept)), "dropped": read["dropped"] | dropped, "examples": read["examples"],
            "moved": moved, "tokenizer_sample_bytes": sample,
        }  # fmt: skip
        return self._meta(tokenizer, splits, report, read["content"])

    def _tokenizer(self, ranges: np.ndarray, keys: np.ndarray, spool: Spool) -> tuple[Tokenizer, int]:
        """The given tokenizer, the one an interrupted run has trained, or one trained on a sample of the train split."""
        if self.given:
            self.given.save(self.partial)
            return self.given, 0
        sizes = ranges[:, 1] - ranges[:, 0]
        limit = SAMPLE_BYTES[self.recipe.tokenizer]
        order = np.argsort(dedup.mix64(keys), kind="stable")
        taken = np.sort(order[np.cumsum(sizes[order]) - sizes[order] < limit])
        sample = int(np.minimum(sizes[taken], limit).sum())
        path = os.path.join(self.partial, MODEL_FILE)
        if os.path.exists(path):
            return load_tokenizer(path), sample
        self.progress("tokenizer", 0, sample)
        texts = (spool.text(int(start), int(end))[:limit] for start, end in ranges[taken])
        trained = train_tokenizer(texts, kind=self.recipe.tokenizer, vocab_size=self.recipe.vocab_size, pieces=self.recipe.pieces)
        trained.save(self.work)
        os.replace(self.path(MODEL_FILE), path)
        self.progress("tokenizer", sample, sample)
        return trained, sample

    def _write(self, split: str, ranges: np.ndarray, spool: Spool, tokenizer: Tokenizer) -> dict[str, Any]:
        total, done = int((ranges[:, 1] - ranges[:, 0]).sum()), [0]

        def advance(size: int) -> None:
            done[0] += size
            self.progress(split, done[0], total)

        return write_split(self.partial, self.work, split, ranges, spool, tokenizer, self.recipe.shard_tokens, advance)

    def _meta(self, tokenizer: Tokenizer, splits: dict[str, Any], report: dict[str, Any], content: str) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "version": VERSION, "dtype": token_dtype(tokenizer.vocab_size), "vocab_size": tokenizer.vocab_size,
            "tokenizer": "bytes" if tokenizer.kind == "bytes" else MODEL_FILE, "eos": tokenizer.eos, "pad": tokenizer.pad,
            "mask": tokenizer.mask, "tokenizer_fingerprint": tokenizer.fingerprint, "splits": splits,
        }  # fmt: skip
        meta["fingerprint"] = _sha(meta)
        tokens, size = (sum(splits[name][key] for name in SPLITS) for key in ("tokens", "bytes"))
        meta["report"] = report | {"bytes_per_token": round(size / max(tokens, 1), 4)}
        meta["sources"] = [printable(spec) for spec in self.specs]
        meta["inputs"] = {"settings": self.settings, "listing": self.listing, "content": content}
        return meta

    def _publish(self) -> dict[str, Any]:
        shutil.rmtree(self.work, ignore_errors=True)
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
            return meta, f"lost {name}" if actual < 0 else f"holds {name} with {actual} bytes instead of {size}"
    if meta["tokenizer"] != "bytes" and not os.path.exists(os.path.join(folder, MODEL_FILE)):
        return meta, f"lost {MODEL_FILE}"
    return meta, None


def _read(job: _Job) -> None:
    """Stage 1: every document that passes the filters into the spool, its range and digest into documents.bin."""
    recipe, refused, filtered = job.recipe, Tally(), Tally()
    normalise, content = normaliser(recipe.normalise), hashlib.sha256()
    position, kept = 0, 0
    with open(job.path("spool"), "wb") as spool, open(job.path("documents.bin"), "wb") as index:
        for name, text in job.documents(refused, content):
            text = normalise(text)
            reason = recipe.filters.reason(text)
            if reason:
                filtered.add(reason, name)
                continue
            data = text.encode()
            spool.write(data)
            index.write(np.array([position, position + len(data)], "<u8").tobytes() + dedup.digest(text).tobytes())
            position, kept = position + len(data), kept + 1
    counts = refused.counts | filtered.counts
    if not kept:
        why = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "the sources hold no document"
        raise InputError(f"no document is left to train on ({why}); give more text or wider filters")
    stage: dict[str, Any] = {"read": kept + sum(counts.values()), "dropped": counts, "content": content.hexdigest()}
    stage["examples"] = refused.examples | filtered.examples
    write_file(job.path("read.json"), _json(stage))


def _deduplicate(job: _Job, documents: np.ndarray, spool: Spool) -> tuple[np.ndarray, dict[str, int]]:
    """Stage 2: positions of the documents to keep [k] int64, ascending, and counts of those dropped."""
    kept, dropped = np.arange(len(documents)), {}
    if job.recipe.dedup_exact:
        kept = np.flatnonzero(dedup.exact_duplicates(documents[:, 2:]) < 0)
        dropped["exact_duplicate"] = len(documents) - len(kept)
    if job.recipe.near:
        near, count = job.recipe.near, len(kept)
        signatures = np.memmap(job.path("signatures"), "<u4", "w+", shape=(count, near.permutations))
        for position, (start, end) in enumerate(documents[kept, :2].tolist()):
            signatures[position] = near.signature(spool.text(start, end))
            job.progress("dedup", position + 1, count)
        kept = kept[dedup.near_duplicates(signatures, near) < 0]
        dropped["near_duplicate"] = count - len(kept)
    return kept, dropped


def _split(documents: np.ndarray, recipe: Recipe) -> tuple[np.ndarray, str]:
    """Stage 3: [k] bool, True for validation, from each document's digest alone; and what was moved to fill a split."""
    seed = dedup.mix64(np.array([recipe.seed % (1 << 64)], np.uint64))
    draws = dedup.mix64(documents[:, 2].astype(np.uint64) ^ seed)
    held_out = draws < np.uint64(recipe.validation_fraction * float(1 << 64))
    if recipe.validation_fraction == 0.0:
        return held_out, ""
    if len(documents) < 2:
        raise InputError("the corpus holds one document, which cannot be both trained on and held out; use lines:PATH, give more, or validation_fraction=0")
    if not held_out.any():
        held_out[draws.argmin()] = True
        return held_out, "one document to validation, which would have been empty"
    if held_out.all():
        held_out[draws.argmax()] = False
        return held_out, "one document to train, which would have been empty"
    return held_out, ""
