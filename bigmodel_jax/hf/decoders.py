"""Published decoders with layer norms: GPT-2, OPT, GPT-NeoX and Pythia, BLOOM.

Each is a config in both directions and one row per weight; `rows.py` does the rest.
"""

from __future__ import annotations

from typing import Any

from bigmodel_jax.errors import InputError
from bigmodel_jax.hf import family as f
from bigmodel_jax.hf.family import Config, Family
from bigmodel_jax.hf.rows import (
    Layout,
    Row,
    Table,
    Tied,
    heads_bias,
    heads_in,
    heads_out,
    split,
    split_heads,
    then,
    transpose,
)  # fmt: skip


def head_rows(s: Config, embed: str, output: str = "lm_head.weight") -> list[Row | Tied]:
    """Output matrix of a decoder, tied to the table `embed` or its own; or the matrix over classes."""
    if s["head"] == "classes":
        return [Row("score.weight", "head/kernel", transpose)]
    if s["head"] == "none":
        return []
    return [Tied(output, embed) if s["tied_embeddings"] else Row(output, "head/kernel", transpose)]


def norm_rows(s: Config, foreign: str, ours: str) -> list[Row]:
    """Scale, and bias where the model has one."""
    rows = [Row(f"{foreign}.weight", f"{ours}/scale")]
    return rows + [Row(f"{foreign}.bias", f"{ours}/bias")] * s["norm_bias"]


def attention_rows(s: Config, foreign: str, names: tuple[str, ...], ours: str = "layers/attn") -> list[Row]:
    """q, k, v and out as four linear layers below `foreign`; their biases where the model has them."""
    h, g = s["num_heads"], f.kv_heads(s)
    biased = s["bias"] if s["qkv_bias"] is None else s["qkv_bias"]
    rows = []
    for name, leaf, heads in zip(names, ("q", "k", "v"), (h, g, g), strict=False):
        rows.append(Row(f"{foreign}.{name}.weight", f"{ours}/{leaf}", heads_in(heads)))
        rows += [Row(f"{foreign}.{name}.bias", f"{ours}/{leaf}_bias", heads_bias(heads))] * biased
    rows.append(Row(f"{foreign}.{names[3]}.weight", f"{ours}/out", heads_out(h)))
    return rows + [Row(f"{foreign}.{names[3]}.bias", f"{ours}/out_bias")] * s["bias"]


def linear_rows(s: Config, foreign: str, ours: str, layout: Layout = transpose) -> list[Row]:
    """A linear layer of the feed-forward part, with its bias where the model has them."""
    rows = [Row(f"{foreign}.weight", ours, layout)]
    return rows + [Row(f"{foreign}.bias", f"{ours}_bias")] * s["bias"]


# GPT-2 (Radford et al. 2019). Its linear layers are stored [in, out], q, k and v as one.


def _gpt2_config(c: Config) -> dict[str, Any]:
    f.only(
        c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
    )  # fmt: skip
    width = f.integer(c, "n_embd")
    return f.head(c, "lm") | {
        "name": "decoder", "vocab_size": f.integer(c, "vocab_size"), "num_layers": f.integer(c, "n_layer"),
        "embed_dim": width, "num_heads": f.integer(c, "n_head"), "mlp_dim": c.get("n_inner") or 4 * width,
        "max_length": f.integer(c, "n_positions", 1024), "norm_eps": f.number(c, "layer_norm_epsilon", 1e-5),
        "activation": f.pick(c, "activation_function", f.ACTIVATIONS, "gelu_new"),
        "tied_embeddings": f.need(c, "tie_word_embeddings", True),
        "dropout": f.number(c, "resid_pdrop", 0.1), "embed_dropout": f.number(c, "embd_pdrop", 0.1),
        "attention_dropout": f.number(c, "attn_pdrop", 0.1),
    }  # fmt: skip


def _gpt2_foreign(s: Config) -> dict[str, Any]:
    return f.architecture(s, "GPT2", "LMHeadModel") | {
        "vocab_size": s["vocab_size"], "n_layer": s["num_layers"], "n_embd": s["embed_dim"],
        "n_head": s["num_heads"], "n_inner": f.mlp_dim(s), "n_positions": s["max_length"],
        "layer_norm_epsilon": s["norm_eps"], "tie_word_embeddings": s["tied_embeddings"],
        "activation_function": f.name_of(f.ACTIVATIONS, s["activation"], "activation"),
        "resid_pdrop": s["dropout"], "embd_pdrop": s["embed_dropout"], "attn_pdrop": s["attention_dropout"],
    }  # fmt: skip


def _gpt2_rows(s: Config) -> Table:
    h, layer = s["num_heads"], "transformer.h.{n}"
    q, k, v = (f"layers/attn/{x}" for x in "qkv")
    return [
        Row("transformer.wte.weight", "embed/tokens"),
        Row("transformer.wpe.weight", "embed/positions"),
        *norm_rows(s, f"{layer}.ln_1", "layers/norm_attn"),
        Row(f"{layer}.attn.c_attn.weight", (q, k, v), then(split(3, axis=1), then(transpose, heads_in(h)))),
        Row(f"{layer}.attn.c_attn.bias", (f"{q}_bias", f"{k}_bias", f"{v}_bias"), then(split(3), heads_bias(h))),
        Row(f"{layer}.attn.c_proj.weight", "layers/attn/out", then(transpose, heads_out(h))),
        Row(f"{layer}.attn.c_proj.bias", "layers/attn/out_bias"),
        *norm_rows(s, f"{layer}.ln_2", "layers/norm_mlp"),
        Row(f"{layer}.mlp.c_fc.weight", "layers/mlp/in"),
        Row(f"{layer}.mlp.c_fc.bias", "layers/mlp/in_bias"),
        Row(f"{layer}.mlp.c_proj.weight", "layers/mlp/out"),
        Row(f"{layer}.mlp.c_proj.bias", "layers/mlp/out_bias"),
        *norm_rows(s, "transformer.ln_f", "norm_final"),
        *head_rows(s, "transformer.wte.weight"),
    ]


# OPT (Zhang et al. 2022). The rows of two positions are never read; 350M has a narrower table and post-norm.


def _opt_config(c: Config) -> dict[str, Any]:
    f.only(c, enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False)
    found, width = f.head(c, "lm"), f.integer(c, "hidden_size")
    narrow = c.get("word_embed_proj_dim") or width
    if narrow != width and found["head"] != "lm":
        raise InputError(f"config.json: 'word_embed_proj_dim' = {narrow} is supported with the head lm only")
    return found | {
        "name": "decoder", "vocab_size": f.integer(c, "vocab_size"), "num_layers": f.integer(c, "num_hidden_layers"),
        "embed_dim": width, "num_heads": f.integer(c, "num_attention_heads"), "mlp_dim": f.integer(c, "ffn_dim"),
        "max_length": f.integer(c, "max_position_embeddings", 2048), "position_offset": 2, "token_dim": narrow,
        "norm_placement": "pre" if f.need(c, "do_layer_norm_before", True) else "post",
        "activation": f.pick(c, "activation_function", f.ACTIVATIONS, "relu"),
        "tied_embeddings": f.need(c, "tie_word_embeddings", True),
        "dropout": f.number(c, "dropout", 0.1), "attention_dropout": f.number(c, "attention_dropout", 0.0),
    }  # fmt: skip


def _opt_foreign(s: Config) -> dict[str, Any]:
    return f.architecture(s, "OPT") | {
        "vocab_size": s["vocab_size"], "num_hidden_layers": s["num_layers"], "hidden_size": s["embed_dim"],
        "num_attention_heads": s["num_heads"], "ffn_dim": f.mlp_dim(s), "max_position_embeddings": s["max_length"],
        "word_embed_proj_dim": s["token_dim"] or s["embed_dim"], "do_layer_norm_before": s["norm_placement"] == "pre",
        "activation_function": f.name_of(f.ACTIVATIONS, s["activation"], "activation"),
        "tie_word_embeddings": s["tied_embeddings"], "dropout": s["dropout"],
        "attention_dropout": s["attention_dropout"],
    }  # fmt: skip


def _opt_rows(s: Config) -> Table:
    base, layer = "model.decoder", "model.decoder.layers.{n}"
    table = [
        Row(f"{base}.embed_tokens.weight", "embed/tokens"),
        Row(f"{base}.embed_positions.weight", "embed/positions"),
        *norm_rows(s, f"{layer}.self_attn_layer_norm", "layers/norm_attn"),
        *attention_rows(s, f"{layer}.self_attn", ("q_proj", "k_proj", "v_proj", "out_proj")),
        *norm_rows(s, f"{layer}.final_layer_norm", "layers/norm_mlp"),
        *linear_rows(s, f"{layer}.fc1", "layers/mlp/in"),
        *linear_rows(s, f"{layer}.fc2", "layers/mlp/out"),
        *head_rows(s, f"{base}.embed_tokens.weight"),
    ]
    if s["token_dim"] not in (0, s["embed_dim"]):
        table.append(Row(f"{base}.project_in.weight", "embed/project", transpose))
        table.append(Row(f"{base}.project_out.weight", "head/project", transpose))
    return table + (norm_rows(s, f"{base}.final_layer_norm", "norm_final") if s["norm_placement"] == "pre" else [])


# GPT-NeoX and Pythia (Black et al. 2022, Biderman et al. 2023).


def fused_rows(s: Config, foreign: str, dense: str) -> list[Row]:
    """q, k and v side by side in every head of one linear layer, and the output layer."""
    h, ours = s["num_heads"], [f"layers/attn/{x}" for x in "qkv"]
    return [
        Row(f"{foreign}.weight", tuple(ours), then(split_heads(h), heads_in(h))),
        Row(f"{foreign}.bias", tuple(f"{x}_bias" for x in ours), then(split_heads(h), heads_bias(h))),
        Row(f"{dense}.weight", "layers/attn/out", heads_out(h)),
        Row(f"{dense}.bias", "layers/attn/out_bias"),
    ]


def _neox_config(c: Config) -> dict[str, Any]:
    f.only(c, attention_bias=True)
    parameters = c.get("rope_parameters") or c.get("rope_scaling") or {}
    f.only(parameters, rope_type="default", type="default")
    dropout = f.number(c, "hidden_dropout", 0.0)
    return f.head(c, "lm") | {
        "name": "decoder", "vocab_size": f.integer(c, "vocab_size"), "num_layers": f.integer(c, "num_hidden_layers"),
        "embed_dim": f.integer(c, "hidden_size"), "num_heads": f.integer(c, "num_attention_heads"),
        "mlp_dim": f.integer(c, "intermediate_size"), "max_length": f.integer(c, "max_position_embeddings", 2048),
        "positions": "rotary", "norm_eps": f.number(c, "layer_norm_eps", 1e-5),
        "rope_theta": f.number(parameters, "rope_theta", c.get("rotary_emb_base", 10_000.0)),
        "rope_fraction": f.number(parameters, "partial_rotary_factor", c.get("rotary_pct", 0.25)),
        "residual": "parallel" if f.need(c, "use_parallel_residual", True) else "sequential",
        "activation": f.pick(c, "hidden_act", f.ACTIVATIONS, "gelu"),
        "tied_embeddings": f.need(c, "tie_word_embeddings", False),
        "dropout": dropout, "embed_dropout": dropout, "attention_dropout": f.number(c, "attention_dropout", 0.0),
    }  # fmt: skip


def _neox_foreign(s: Config) -> dict[str, Any]:
    return f.architecture(s, "GPTNeoX") | {
        "vocab_size": s["vocab_size"], "num_hidden_layers": s["num_layers"], "hidden_size": s["embed_dim"],
        "num_attention_heads": s["num_heads"], "intermediate_size": f.mlp_dim(s), "layer_norm_eps": s["norm_eps"],
        "max_position_embeddings": s["max_length"], "rotary_emb_base": s["rope_theta"],
        "rotary_pct": s["rope_fraction"], "use_parallel_residual": s["residual"] == "parallel",
        "hidden_act": f.name_of(f.ACTIVATIONS, s["activation"], "activation"),
        "tie_word_embeddings": s["tied_embeddings"], "hidden_dropout": s["dropout"],
        "attention_dropout": s["attention_dropout"],
    }  # fmt: skip


def _neox_rows(s: Config) -> Table:
    layer = "gpt_neox.layers.{n}"
    return [
        Row("gpt_neox.embed_in.weight", "embed/tokens"),
        *norm_rows(s, f"{layer}.input_layernorm", "layers/norm_attn"),
        *fused_rows(s, f"{layer}.attention.query_key_value", f"{layer}.attention.dense"),
        *norm_rows(s, f"{layer}.post_attention_layernorm", "layers/norm_mlp"),
        *linear_rows(s, f"{layer}.mlp.dense_h_to_4h", "layers/mlp/in"),
        *linear_rows(s, f"{layer}.mlp.dense_4h_to_h", "layers/mlp/out"),
        *norm_rows(s, "gpt_neox.final_layer_norm", "norm_final"),
        *head_rows(s, "gpt_neox.embed_in.weight", "embed_out.weight"),
    ]


# BLOOM (Scao et al. 2022): linear biases of attention, a norm behind the embedding.


def _bloom_config(c: Config) -> dict[str, Any]:
    f.only(c, apply_residual_connection_post_layernorm=False)
    width = c.get("n_embed") or f.integer(c, "hidden_size")
    return f.head(c, "lm") | {
        "name": "decoder", "vocab_size": f.integer(c, "vocab_size"), "embed_dim": width,
        "num_layers": f.integer(c, "n_layer" if "n_layer" in c else "num_hidden_layers"),
        "num_heads": f.integer(c, "n_head" if "n_head" in c else "num_attention_heads"),
        "max_length": f.integer(c, "seq_length", 2048), "positions": "alibi", "embed_norm": True,
        "norm_eps": f.number(c, "layer_norm_epsilon", 1e-5), "tied_embeddings": f.need(c, "tie_word_embeddings", True),
        "dropout": f.number(c, "hidden_dropout", 0.0), "attention_dropout": f.number(c, "attention_dropout", 0.0),
    }  # fmt: skip


def _bloom_foreign(s: Config) -> dict[str, Any]:
    return f.architecture(s, "Bloom") | {
        "vocab_size": s["vocab_size"], "n_layer": s["num_layers"], "hidden_size": s["embed_dim"],
        "n_head": s["num_heads"], "seq_length": s["max_length"], "layer_norm_epsilon": s["norm_eps"],
        "tie_word_embeddings": s["tied_embeddings"], "hidden_dropout": s["dropout"],
        "attention_dropout": s["attention_dropout"],
    }  # fmt: skip


def _bloom_rows(s: Config) -> Table:
    layer = "transformer.h.{n}"
    return [
        Row("transformer.word_embeddings.weight", "embed/tokens"),
        *norm_rows(s, "transformer.word_embeddings_layernorm", "embed/norm"),
        *norm_rows(s, f"{layer}.input_layernorm", "layers/norm_attn"),
        *fused_rows(s, f"{layer}.self_attention.query_key_value", f"{layer}.self_attention.dense"),
        *norm_rows(s, f"{layer}.post_attention_layernorm", "layers/norm_mlp"),
        *linear_rows(s, f"{layer}.mlp.dense_h_to_4h", "layers/mlp/in"),
        *linear_rows(s, f"{layer}.mlp.dense_4h_to_h", "layers/mlp/out"),
        *norm_rows(s, "transformer.ln_f", "norm_final"),
        *head_rows(s, "transformer.word_embeddings.weight"),
    ]


FAMILIES = {
    "gpt2": Family(
        _gpt2_config, _gpt2_foreign, _gpt2_rows, "transformer.", ignored=(r"\.attn\.(masked_)?bias$",)
    ),
    "opt": Family(_opt_config, _opt_foreign, _opt_rows, "model.", renames=((r"^decoder\.", "model.decoder."),)),
    "gpt_neox": Family(
        _neox_config, _neox_foreign, _neox_rows, "gpt_neox.",
        ignored=(r"\.attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$"),
    ),
    "bloom": Family(_bloom_config, _bloom_foreign, _bloom_rows, "transformer."),
}  # fmt: skip
