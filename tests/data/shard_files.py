"""Token shard directories for tests, written straight from the format's description."""

import hashlib
import json
from pathlib import Path

import numpy as np

EOS, PAD = 0, 1


def documents(count, seed=0, longest=40, vocab=200):
    """Random documents of 1 ... longest tokens, never containing EOS or PAD."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, vocab, rng.integers(1, longest + 1)) for _ in range(count)]


def write(folder, shards, split="train", dtype="uint16", vocab=200, more=None):
    """`shards`: a list of lists of documents. Returns the folder; `more` adds splits."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for name, parts in {split: shards, **(more or {})}.items():
        entries = []
        for number, docs in enumerate(parts):
            ends = np.cumsum([len(d) + 1 for d in docs]).astype("<u8") + np.uint64(1)
            tokens = np.concatenate([[EOS], *[np.append(d, EOS) for d in docs]]).astype(
                np.dtype(dtype).newbyteorder("<")
            )
            file = f"{name}-{number:05d}.bin"
            (folder / file).write_bytes(tokens.tobytes())
            (folder / file.replace(".bin", ".idx")).write_bytes(ends.tobytes())
            entries.append({
                "file": file, "tokens": len(tokens), "documents": len(docs), "bytes": 3 * len(tokens),
                "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
            })  # fmt: skip
        splits[name] = {"shards": entries}
    content = hashlib.sha256(json.dumps(splits).encode()).hexdigest()
    meta = {
        "version": 1, "dtype": dtype, "vocab_size": vocab, "tokenizer": "bytes", "eos": EOS, "pad": PAD,
        "tokenizer_fingerprint": "t", "splits": splits, "fingerprint": content, "report": {},
    }  # fmt: skip
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)
