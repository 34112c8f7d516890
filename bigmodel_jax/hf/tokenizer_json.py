"""Our byte tokenizer as tokenizer.json, so that what was trained on bytes opens elsewhere with the same ids."""

from __future__ import annotations

import json

from bigmodel_jax.data.pieces import Bytes
from bigmodel_jax.data.published import CHARACTERS

SPECIAL = {"eos": "<|endoftext|>", "pad": "<pad>", "mask": "<mask>"}


def of_bytes(tokenizer: Bytes) -> dict[str, str]:
    """{file name: text}: byte-level BPE without merges, id = byte, and the special ids behind them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ids = dict(CHARACTERS)
    roles = {f"{role}_token": name for role, name in SPECIAL.items()}
    for role, name in SPECIAL.items():
        ids[name] = getattr(tokenizer, role)
    engine = Tokenizer(models.BPE(ids, []))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL.values()])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    return {"tokenizer.json": engine.to_str(), "tokenizer_config.json": json.dumps(config, indent=1) + "\n"}
