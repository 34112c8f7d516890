"""Every family that generates, tiny: published configs made small, with random weights of order one."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from bigmodel_jax import tree
from bigmodel_jax.models import MODELS
from tests.hf.test_families import PUBLISHED, section_of

VOCAB, WINDOW = 37, 5
# The keys by which configs name these sizes; a config takes those that it has.
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 16, "n_embd": 16, "n_embed": 16, "d_model": 16, "word_embed_proj_dim": 16,
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "d_kv": 4, "intermediate_size": 24, "ffn_dim": 24, "d_ff": 24,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "n_positions": 40, "max_position_embeddings": 40,
    "num_local_experts": 4, "sliding_window": WINDOW, "sliding_window_pattern": 2, "query_pre_attn_scalar": 9,
    "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0,
}  # fmt: skip
# What a small config needs for an option of its family to matter.
MORE = {
    "gemma-2b": {"num_key_value_heads": 1},
    "opt-350m": {"word_embed_proj_dim": 12},
    "pythia-70m": {"rotary_pct": 0.5},
    "llama-3.1-8b": {"rope_scaling": PUBLISHED["llama-3.1-8b"][1]["rope_scaling"] | {
        "original_max_position_embeddings": 12}},
    "t5-small": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 9},
}  # fmt: skip
MORE["t5-v1.1-small"] = MORE["t5-small"]
# The reference attention compiles fastest; the others are held equal to it elsewhere.
QUICK = {"attention": "reference", "remat": "none"}


def _published(name: str, **more) -> dict:
    config = PUBLISHED[name][1]
    sized = {key: size for key, size in SMALL.items() if config.get(key)}
    return section_of(config | sized | MORE.get(name, {}) | more) | QUICK


_OWN = {"vocab_size": VOCAB, "num_layers": 2, "embed_dim": 16}
_DECODER = {"name": "decoder", **_OWN, "num_heads": 4, "max_length": 40} | QUICK
_RECURRENT = {"vocab_size": VOCAB, "embed_dim": 8, "hidden_dim": 10, "num_layers": 2}
DECODERS = {
    name: _published(name)
    for name in ("gpt2", "opt-125m", "opt-350m", "pythia-70m", "bloom-560m", "llama-3.1-8b", "mistral-7b",
                 "qwen2-0.5b", "qwen3-0.6b", "gemma-2b", "gemma-2-2b", "gemma-3-1b", "mixtral-8x7b")
} | {
    "llama-2, linear rope": _published(
        "llama-3.1-8b", num_key_value_heads=4, rope_scaling={"type": "linear", "factor": 4.0}
    ),
    # Of every expert's queue: as many places as there are tokens.
    "mixtral, capacity": _published("mixtral-8x7b") | {"capacity_factor": 2.0},
    # What no published family has.
    "alibi, window": _DECODER | {
        "positions": "alibi", "window": WINDOW, "residual": "parallel", "num_heads": 6, "num_kv_heads": 1, "head_dim": 4
    },
    "shared layers": _DECODER | {"positions": "sinusoidal", "norm_placement": "post", "shared_layers": True},
    "lstm": {"name": "recurrent_lm", **_RECURRENT},
    "gru": {"name": "recurrent_lm", "cell": "gru", **_RECURRENT},
}  # fmt: skip
PAIRS = {name: _published(name) for name in ("t5-small", "t5-v1.1-small", "bart-base")} | {
    "original": {"name": "encoder_decoder", **_OWN, "num_heads": 4} | QUICK,
    "recurrent pair": {"name": "recurrent_seq2seq", "cell": "lstm", **_RECURRENT},
}
# The others have one layer, which compiles faster; these have layers of two kinds, or stand for all.
TWO_LAYERS = ("gpt2", "gemma-2-2b", "gemma-3-1b", "shared layers", "t5-small", "bart-base", "original")
FAMILIES = {
    name: section if name in TWO_LAYERS else section | dict.fromkeys({"num_layers", "decoder_layers"} & set(section), 1)
    for name, section in (DECODERS | PAIRS).items()
}


@functools.cache
def tiny(name: str):
    """(model, variables): matrices of deviation 0.3, scales of 1 +- 0.3, biases that are not zero."""
    section = FAMILIES[name]
    model = MODELS[section["name"]](**{key: value for key, value in section.items() if key != "name"})
    rng = np.random.default_rng(1)
    middle = 1.0 - section.get("norm_offset", 0.0)

    def fill(path, leaf):
        return jnp.asarray(middle * path.endswith("scale") + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return model, tree.map_paths(fill, model.abstract()[0])
