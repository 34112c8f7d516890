"""Which documents of a corpus repeat an earlier one, exactly or nearly, in bounded memory.

Exact: 128-bit digests, sorted. Near: MinHash signatures (Broder, 1997) of word n-grams, cut into bands so
that similar documents share a bucket (locality-sensitive hashing: Indyk and Motwani, 1998), each candidate
then verified by the share of equal signature entries, which estimates the Jaccard similarity J with a
standard deviation of sqrt(J (1 - J) / permutations).

Both return, for every document, the position of the document it repeats, or -1 for those to keep. A
document is dropped only for the sake of one that is kept: similarity is not passed on through chains.

Memory: 16 bytes per document for digests; 24 bytes per document and one sort buffer of `memory` bytes for
near-duplicates, with the signatures (4 bytes x permutations per document) in a memory-mapped file where the
caller keeps them there.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from bigmodel_jax.errors import InputError

EMPTY = np.uint32(0xFFFFFFFF)  # every entry of the signature of a text without words
_BLOCK = 512  # shingles hashed at once: 512 x 128 x 8 bytes stay in the L2 cache


def digest(text: str) -> np.ndarray:
    """128-bit content hash of `text` as [2] uint64."""
    return np.frombuffer(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), "<u8")


def exact_duplicates(digests: np.ndarray) -> np.ndarray:
    """digests [n, 2] uint64 -> [n] int64: position of the first document with the same digest, -1 for that
    one itself.
    """
    count = len(digests)
    result = np.full(count, -1, np.int64)
    if count:
        order = np.lexsort((np.arange(count), digests[:, 1], digests[:, 0]))
        ranked = digests[order]
        new = np.concatenate([[True], (ranked[1:] != ranked[:-1]).any(axis=1)])
        first = order[np.maximum.accumulate(np.where(new, np.arange(count), 0))]
        result[order] = np.where(new, -1, first)
    return result


@dataclasses.dataclass(frozen=True)
class MinHash:
    """How similarity is measured.

    ngram: words (runs of letters, digits and underscores, lower-cased) per shingle; with `characters`,
        characters
        per shingle instead, for text written without spaces.
    threshold: estimated Jaccard similarity of two shingle sets from which on the later document is dropped.
    permutations: signature length. bands: signature cuts; 0 takes the fewest that miss under 1% at the
    threshold.
    """

    ngram: int = 5
    threshold: float = 0.8
    permutations: int = 128
    bands: int = 0
    characters: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise InputError(f"near-duplicate threshold {self.threshold} should be above 0 and at most 1")
        if self.ngram < 1 or self.permutations < 1 or not 0 <= self.bands <= self.permutations:
            raise InputError(
                f"near-duplicate ngram {self.ngram}, permutations {self.permutations}, bands {self.bands}: "
                "ngram and permutations should be at least 1, bands between 0 and permutations"
            )

    @property
    def layout(self) -> tuple[int, int]:
        """(bands, rows per band). A pair of similarity J shares a bucket with probability 1 - (1 -
        J^rows)^bands.
        """
        if self.bands:
            return self.bands, self.permutations // self.bands
        for rows in range(self.permutations, 0, -1):
            bands = self.permutations // rows
            if (1.0 - self.threshold**rows) ** bands < 0.01:
                return bands, rows
        return self.permutations, 1

    def signature(self, text: str) -> np.ndarray:
        """Signature [permutations] uint32 of one text; all EMPTY where it holds no shingle."""
        shingles = self.shingles(text)
        low = np.full(self.permutations, np.uint64(EMPTY) << np.uint64(32), np.uint64)
        random = np.random.Generator(np.random.PCG64(self.seed % (1 << 64)))
        scale = random.integers(0, 1 << 63, self.permutations, np.uint64) * np.uint64(2) + np.uint64(1)
        shift = random.integers(0, 1 << 63, self.permutations, np.uint64)
        for start in range(0, len(shingles), _BLOCK):
            hashed = shingles[start : start + _BLOCK, None] * scale + shift
            np.minimum(low, hashed.min(axis=0), out=low)
        return (low >> np.uint64(32)).astype(np.uint32)

    def shingles(self, text: str) -> np.ndarray:
        """64-bit hashes of the distinct shingles of one text. A text shorter than one shingle is one
        shingle.
        """
        points = np.frombuffer(text.lower().encode("utf-32-le", "surrogatepass"), "<u4")
        units = mix64(points.astype(np.uint64)) if self.characters else _word_hashes(points)
        if not len(units):
            return units
        width = min(self.ngram, len(units))
        total = np.zeros(len(units) - width + 1, np.uint64)
        for offset in range(width):
            total = mix64(total + units[offset : offset + len(total)])
        return np.unique(total)


def mix64(x: np.ndarray) -> np.ndarray:
    """splitmix64 finaliser (Steele et al., 2014): a bijection of 64-bit words without visible structure."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _word_hashes(points: np.ndarray) -> np.ndarray:
    """Hash of each word of a text given as code points [n] uint32, in order.

    A word's hash is the sum over its characters of mix(character, place in the word), so a running sum over
    the text gives all of them at once.
    """
    distinct, inverse = np.unique(points, return_inverse=True)
    letters = np.fromiter((chr(p).isalnum() or p == 0x5F for p in distinct.tolist()), bool, len(distinct))[inverse]
    edges = np.flatnonzero(np.diff(np.concatenate([[False], letters, [False]])))
    starts, ends = edges[0::2], edges[1::2]
    if not len(starts):
        return np.zeros(0, np.uint64)
    begin = np.zeros(len(points), np.int64)
    begin[starts] = starts
    place = np.arange(len(points)) - np.maximum.accumulate(begin)
    values = np.where(letters, mix64(points.astype(np.uint64) << np.uint64(32) | place.astype(np.uint64)), np.uint64(0))
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values, dtype=np.uint64)])
    return mix64(running[ends] - running[starts])


def near_duplicates(signatures: np.ndarray, settings: MinHash, *, memory: int = 256 << 20) -> np.ndarray:
    """signatures [n, permutations] uint32 (an array or a memory map) -> [n] int64: the kept document
    repeated, or -1.

    memory: bytes for the sort buffer; more documents than fit are sorted in several passes over the
    signatures.
    """
    count = len(signatures)
    group = np.arange(count)
    bands, rows = settings.layout
    passes = max(1, -(-count * 40 // memory))
    for band in range(bands):
        columns = slice(band * rows, (band + 1) * rows)
        for part in range(passes):
            keys, members = _bucket_keys(signatures, columns, passes, part)
            for bucket in _buckets(keys, members):
                _join(bucket, signatures, settings, group)
    return _keep_first(signatures, group, settings)


def _bucket_keys(signatures: np.ndarray, columns: slice, passes: int, part: int) -> tuple[np.ndarray, np.ndarray]:
    """Band hashes of the documents whose hash falls to this pass, and their positions; texts without
    shingles left out.
    """
    keys, members = [], []
    for start in range(0, len(signatures), 1 << 16):
        block = np.asarray(signatures[start : start + (1 << 16)])
        key = np.zeros(len(block), np.uint64)
        for column in range(columns.start, columns.stop):
            key = mix64(key + block[:, column])
        chosen = np.flatnonzero((key % np.uint64(passes) == part) & (block[:, 0] != EMPTY))
        keys.append(key[chosen])
        members.append(chosen + start)
    return (np.concatenate(keys), np.concatenate(members)) if keys else (np.zeros(0, np.uint64), np.zeros(0, np.int64))


def _buckets(keys: np.ndarray, members: np.ndarray) -> list[np.ndarray]:
    """Positions that share a key, ascending, for every key held by two or more."""
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    edges = np.concatenate([[0], np.flatnonzero(ranked[1:] != ranked[:-1]) + 1, [len(ranked)]])
    shared = np.flatnonzero(np.diff(edges) > 1)
    return [members[order[edges[i] : edges[i + 1]]] for i in shared]


def _root(group: np.ndarray, position: int) -> int:
    while group[position] != position:
        group[position] = group[group[position]]
        position = int(group[position])
    return position


def _join(bucket: np.ndarray, signatures: np.ndarray, settings: MinHash, group: np.ndarray) -> None:
    """Join the members of a bucket that are similar enough to its leader; the rest elect the next."""
    while len(bucket) > 1:
        leader = np.asarray(signatures[bucket[0]])
        similar = np.empty(len(bucket) - 1, bool)
        for start in range(0, len(similar), 1 << 14):
            rest = np.asarray(signatures[bucket[1 + start : 1 + start + (1 << 14)]])
            similar[start : start + len(rest)] = (rest == leader).mean(axis=1) >= settings.threshold
        top = _root(group, int(bucket[0]))
        for position in bucket[1:][similar].tolist():
            low, high = sorted((top, _root(group, position)))
            group[high] = low
            top = low
        bucket = bucket[1:][~similar]


def _keep_first(signatures: np.ndarray, group: np.ndarray, settings: MinHash) -> np.ndarray:
    """Within each joined group, in document order: keep a document unless similar to one already kept."""
    result = np.full(len(group), -1, np.int64)
    roots = np.array([_root(group, position) for position in range(len(group))], np.int64)
    for members in _buckets(roots.astype(np.uint64), np.arange(len(group))):
        kept = [int(members[0])]
        table = np.asarray(signatures[members[0]])[None]
        for position in members[1:].tolist():
            own = np.asarray(signatures[position])
            share = (table == own).mean(axis=1)
            best = int(share.argmax())
            if share[best] >= settings.threshold:
                result[position] = kept[best]
            else:
                kept.append(position)
                table = np.concatenate([table, own[None]])
    return result


def similarity(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> float:
    """Share of equal entries of two signatures: the estimate of the Jaccard similarity of their texts."""
    return float((np.asarray(a) == np.asarray(b)).mean())
