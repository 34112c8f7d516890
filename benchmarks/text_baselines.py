"""What a trained text model is held against, on exactly the bytes and masks of its evaluation.

    python benchmarks/text_baselines.py runs/first          # causal LM: compressors
    python benchmarks/text_baselines.py runs/mlm            # masked LM: counts of both neighbours
    python benchmarks/text_baselines.py runs/mlm --config.data.rate=0.15      # both on other masks than in training

Causal LM: bits per byte of gzip -9, bz2 -9, xz -9e, and xz primed with the training text (a
dictionary that holds all of it), on the held-out documents joined. Masked LM: accuracy of a count
model that predicts a token from its left and right neighbour, on the same masked rows. Adds a row to
results/text_baselines.json.
"""

from __future__ import annotations

import bz2
import json
import lzma
import subprocess
import sys
import tempfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from bigmodel_jax import experiment
from bigmodel_jax.data.token_rows import TokenShards

RESULT = Path(__file__).resolve().parent.parent / "results" / "text_baselines.json"


def tokens_of(shards: TokenShards) -> np.ndarray:
    """All tokens of a split in order, separators included."""
    rows = shards.gather(np.arange(len(shards)))
    return np.concatenate([[shards.meta["eos"]], rows["targets"][rows["weights"] > 0]])


def xz(data: bytes, dictionary: int) -> int:
    """Compressed size at preset 9e with a dictionary of so many bytes."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))


def compressors(train: bytes, held_out: bytes) -> dict[str, float]:
    """Bits per held-out byte of each compressor."""
    large = 1 << max(26, (len(train) + len(held_out)).bit_length())
    sizes = {
        "gzip -9": len(zlib.compress(held_out, 9)),
        "bz2 -9": len(bz2.compress(held_out, 9)),
        "xz -9e": xz(held_out, 1 << 26),
        "xz -9e primed": xz(train + held_out, large) - xz(train, large),
    }
    return {name: 8 * size / len(held_out) for name, size in sizes.items()}


def counts_accuracy(stream: np.ndarray, batches: list[dict[str, np.ndarray]]) -> float:
    """Accuracy of the most likely token between two neighbours.

    Counts of (left, token, right) decide; unseen pairs of neighbours fall back to
    count(left, token) * count(token, right) / count(token), then to the most frequent token.
    """
    between, after, before = defaultdict(Counter), defaultdict(Counter), defaultdict(Counter)
    single = Counter(stream.tolist())
    for left, token, right in zip(stream[:-2].tolist(), stream[1:-1].tolist(), stream[2:].tolist(), strict=True):
        between[left, right][token] += 1
        after[left][token] += 1
        before[right][token] += 1
    common = single.most_common(1)[0][0]

    def guess(left: int, right: int) -> int:
        if (left, right) in between:
            return between[left, right].most_common(1)[0][0]
        both = after[left].keys() & before[right].keys()
        if both:
            return max(both, key=lambda t: (after[left][t] * before[right][t] / single[t], t))
        for table, key in ((after, left), (before, right)):
            if table[key]:
                return table[key].most_common(1)[0][0]
        return common

    right_answers = total = 0
    for batch in batches:
        tokens, last = batch["tokens"], batch["tokens"].shape[1] - 1
        for row, slot in np.argwhere(batch["masked_weights"] > 0):
            at = batch["masked_positions"][row, slot]
            left, right = tokens[row, max(at - 1, 0)], tokens[row, min(at + 1, last)]
            right_answers += guess(int(left), int(right)) == batch["masked_targets"][row, slot]
            total += 1
    return right_answers / total


def evaluated(run: str, overrides: list[str]) -> dict[str, float]:
    """What the run says of its held-out set, or what `bigmodel eval` says of it as overridden."""
    if not overrides:
        return json.loads((Path(run) / "result.json").read_text())["eval"]["validation"]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "bigmodel_jax.cli", "eval", "--workdir", run, "--out", out, *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads((Path(out) / "eval.json").read_text())["eval"]["validation"]


def main(run: str, *overrides: str) -> None:
    config = experiment.resolve(json.loads((Path(run) / "config.json").read_text()), overrides)
    exp = experiment.build(config)
    found = evaluated(run, list(overrides))
    held_out = exp.data.evals["validation"]
    train = tokens_of(exp.data.train.source)
    if config["data"]["name"] == "text":
        decode = exp.data.tokenizer.decode_bytes
        row = {"model": found["bits_per_byte"], **compressors(decode(train), decode(tokens_of(held_out.source)))}
        unit = "bits per byte"
    else:
        batches = [held_out.batch(step) for step in range(held_out.num_eval_batches)]
        row = {"model": found["accuracy"], "counts of both neighbours": counts_accuracy(train, batches)}
        unit = "accuracy"
    for name, value in row.items():
        print(f"{name:28} {value:.4f} {unit}")
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    key = " ".join([config["model"]["name"], experiment.config_hash(config), *overrides])
    results[key] = {"steps": config["steps"], "unit": unit, **{k: round(v, 4) for k, v in row.items()}}
    RESULT.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
