"""Word error rate of a letters-to-phonemes run on the held-out words of its dictionary.

    python benchmarks/g2p.py runs/g2p [--rows 256] [--words 0]

Greedy decoding through the cache. A word is right when what is written equals any of its listed
pronunciations; stress is dropped, and counted as well where the run was trained with it. Also the phoneme
error rate: edits to the nearest pronunciation over its length. Adds a row to results/g2p.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from bigmodel_jax import answers, offline
from bigmodel_jax.data.datasets import DATASETS
from bigmodel_jax.data.pairs import Cmudict

RESULT = Path(__file__).resolve().parent.parent / "results" / "g2p.json"


def dropped(phonemes: str) -> list[str]:
    """Phonemes without the digits of stress."""
    return [phoneme.rstrip("012") for phoneme in phonemes.split()]


def edits(a: list[str], b: list[str]) -> int:
    """Insertions, deletions and substitutions that turn `a` into `b` (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def held_out(data: Cmudict, seed: int) -> dict[str, list[str]]:
    """{word: its pronunciations} of the words that the run never saw."""
    words: dict[str, list[str]] = {}
    for word, said in zip(*data.splits(seed)["validation"], strict=True):
        words.setdefault(word, []).append(said)
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--rows", type=int, default=256, help="words at a time")
    parser.add_argument("--words", type=int, default=0, help="only the first so many; 0 for all")
    options = parser.parse_args()
    exp, programs, state, step = offline.open_run(options.run, ())
    settings = {key: value for key, value in exp.config["data"].items() if key != "name"}
    found = held_out(DATASETS["cmudict"](**settings), exp.run.seed)
    words = sorted(found)[: options.words or None]
    reader = exp.data.source_tokenizer
    sources = [[*ids.tolist(), reader.eos] for ids in reader.encode_batch(words)]
    asked = answers.Task(
        np.arange(len(words)), [[exp.data.decoder_start]] * len(words), sources, [found[w] for w in words], words,
        length=2 + max(len(said.split()) for w in words for said in found[w]),
    )  # fmt: skip
    start = time.perf_counter()
    written = answers.predict(exp, programs.eval_variables(state), asked, options.rows)
    seconds = time.perf_counter() - start
    wrong, stress, errors, phonemes = [], [], 0, 0
    for word, said in zip(words, written, strict=True):
        best, length = min((edits(dropped(said), dropped(right)), len(right.split())) for right in found[word])
        wrong.append(best > 0)
        stress.append(said.split() not in [right.split() for right in found[word]])
        errors, phonemes = errors + best, phonemes + length
    n, rate = len(words), float(np.mean(wrong))
    spread = 1.96 * (rate * (1 - rate) / n) ** 0.5
    name = Path(options.run).resolve().name
    row = {
        "run": name, "step": step, "words": n, "word_error_rate": rate,
        "interval": [rate - spread, rate + spread],
        "with_stress": float(np.mean(stress)) if settings["stress"] else None,
        "phoneme_error_rate": errors / phonemes, "seconds": round(seconds, 1),
    }  # fmt: skip
    rows = json.loads(RESULT.read_text()) if RESULT.exists() else []
    RESULT.write_text(json.dumps([r for r in rows if r["run"] != name] + [row], indent=1) + "\n")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
