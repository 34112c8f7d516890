"""Instruction tuning in a minute: a tiny decoder learns to answer questions about words it was pretrained on.

    bigmodel train --config configs/finetune_chat.py:pretrain --workdir runs/chat/pretrain
    bigmodel train --config configs/finetune_chat.py:full --workdir runs/chat/full
    bigmodel train --config configs/finetune_chat.py:lora --workdir runs/chat/lora          4.4% of the parameters
    bigmodel eval --workdir runs/chat/full
    bigmodel generate --workdir runs/chat/full --temperature 0 --prompt "### User
    How long is the word 'float'?
    ### Assistant
    "

The conversations are made here, of names in Python's standard library: their length, first and last letter. The
loss is on answers alone, in the chat template of data/instructions.py; a tenth of the words is held out. Of the bytes
of their answers 98.3% are right after `full` and 96.7% after `lora` (held-out loss 0.065 and 0.214 nats a byte).
Written out, 66.7% [59.8, 72.6] and 35.8% [29.4, 42.2] of the 204 answers are exactly right (ROUGE-L 0.917, 0.840).
Norms have no bias, so that `bigmodel convert --from runs/chat/lora --to hf:FOLDER` can write a Llama.
"""

import json
import keyword
import os
from pathlib import Path

from ml_collections import ConfigDict

from bigmodel_jax import atomic
from bigmodel_jax.data.storage import cache_root

ARGS = ("pretrain", "full", "lora")


def words() -> list[str]:
    """Names that every Python has."""
    import builtins

    return sorted({*dir(builtins), *keyword.kwlist, *dir(str), *dir(os), *dir(list), *dir(dict)})


def conversations() -> str:
    """A JSONL file of questions and answers in the cache, written on first use."""
    path = Path(cache_root()) / "conversations.jsonl"
    asked = (
        ("How long is the word '{}'?", lambda w: f"It has {len(w)} letters."),
        ("What does '{}' begin with?", lambda w: f"With the letter {w[0]}."),
        ("What does '{}' end with?", lambda w: f"With the letter {w[-1]}."),
    )
    rows = [
        {
            "word": word,
            "messages": [{"role": "user", "content": q.format(word)}, {"role": "assistant", "content": a(word)}],
        }
        for word in words()
        for q, a in asked
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, text)
    return str(path)


def get_config(part: str = "full") -> ConfigDict:
    config = ConfigDict()
    config.batch_size = 16
    config.steps = 300
    config.model = {
        "name": "decoder", "num_layers": 4, "embed_dim": 128, "num_heads": 2, "mlp_dim": 512, "positions": "rotary",
        "norm": "rmsnorm", "norm_bias": False, "activation": "swiglu", "bias": False, "remat": "none",
    }  # fmt: skip
    config.objective = {"name": "causal_lm"}
    config.optimizer = {"name": "adamw", "lr": 2e-3, "clip": 1.0}
    config.schedule = {"name": "cosine", "warmup": 20}
    config.data = {"name": "text", "corpus": "stdlib", "tokenizer": "bytes", "length": 128}
    if part != "pretrain":
        config.data = {
            "name": "instructions", "train": conversations(), "group": "word", "tokenizer": "bytes", "length": 160,
        }  # fmt: skip
        config.init_from = {"path": "runs/chat/pretrain"}
    if part == "lora":
        config.lora = {"rank": 4, "alpha": 16.0, "targets": (r"attn/(q|k|v|out)$", r"/mlp/")}
    config.eval = {"every": 100, "batch_size": 16}
    return config
