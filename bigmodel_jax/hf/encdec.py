"""Published encoder-decoders: T5, T5 v1.1 and BART."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from bigmodel_jax.errors import InputError
from bigmodel_jax.hf import family as f
from bigmodel_jax.hf.decoders import attention_rows, linear_rows, norm_rows
from bigmodel_jax.hf.family import Config, Family
from bigmodel_jax.hf.rows import Layout, Row, Table, Tied, transpose

T5_ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu", "gelu": "gelu_exact", "gated-silu": "swiglu"}
row_vector = Layout(lambda x: (x[0],), lambda x: (np.asarray(x)[None],))  # [1, V] <-> [V]


def head(c: Config) -> str:
    """The head that "architectures" names: "lm" or "none"."""
    name = str((c.get("architectures") or ["ForConditionalGeneration"])[0])
    if name.endswith(("ForConditionalGeneration", "WithLMHeadModel")):
        return "lm"
    if name.endswith("Model") and not name.endswith("EncoderModel"):
        return "none"
    raise InputError(f"config.json: architecture {name!r} is not supported, only ForConditionalGeneration and Model")


def architecture(s: Config, family: str) -> dict[str, Any]:
    """The inverse of `head`."""
    return {"architectures": [family + ("ForConditionalGeneration" if s["head"] == "lm" else "Model")]}


def meaning(s: Config) -> dict[str, Any]:
    """A section with the sizes that 0 stands for."""
    scale = s["embed_scale"] or s["embed_dim"] ** 0.5
    layers, mlp = s["decoder_layers"] or s["num_layers"], s["decoder_mlp_dim"] or f.mlp_dim(s)
    return {**s, "decoder_layers": layers, "decoder_mlp_dim": mlp, "embed_scale": scale}


# T5 (Raffel et al. 2020); v1.1 has gated layers, an output matrix of its own and no scaling before it.


def _t5_config(c: Config) -> dict[str, Any]:
    f.only(c, is_encoder_decoder=True)
    width, layers = f.integer(c, "d_model"), f.integer(c, "num_layers")
    tied, rate = f.need(c, "tie_word_embeddings", True), f.number(c, "dropout_rate", 0.1)
    return {
        "name": "encoder_decoder", "head": head(c), "vocab_size": f.integer(c, "vocab_size"), "embed_dim": width,
        "num_layers": layers, "decoder_layers": c.get("num_decoder_layers") or layers, "positions": "none",
        "num_heads": f.integer(c, "num_heads"), "head_dim": f.integer(c, "d_kv"), "mlp_dim": f.integer(c, "d_ff"),
        "relative_buckets": f.integer(c, "relative_attention_num_buckets", 32), "attention_scale": 1.0,
        "relative_distance": f.integer(c, "relative_attention_max_distance", 128), "norm": "rmsnorm",
        "norm_bias": False, "norm_eps": f.number(c, "layer_norm_epsilon", 1e-6), "norm_placement": "pre",
        "activation": f.pick(c, "feed_forward_proj", T5_ACTIVATIONS, "relu"), "bias": False, "embed_scale": 1.0,
        "tied_embeddings": tied, "head_scale": width**-0.5 if c.get("scale_decoder_outputs", tied) else 1.0,
        "dropout": rate, "embed_dropout": rate, "attention_dropout": rate,
    }  # fmt: skip


def _t5_fit(s: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Newer configs say that v1.1 is tied; its file has both matrices."""
    return s | {"tied_embeddings": "lm_head.weight" not in names} if s["head"] == "lm" else s


def _t5_foreign(s: Config) -> dict[str, Any]:
    return architecture(s, "T5") | {
        "vocab_size": s["vocab_size"], "d_model": s["embed_dim"], "num_layers": s["num_layers"],
        "num_decoder_layers": s["decoder_layers"] or s["num_layers"], "num_heads": s["num_heads"],
        "d_kv": f.head_dim(s), "d_ff": f.mlp_dim(s), "relative_attention_num_buckets": s["relative_buckets"],
        "relative_attention_max_distance": s["relative_distance"], "layer_norm_epsilon": s["norm_eps"],
        "feed_forward_proj": f.name_of(T5_ACTIVATIONS, s["activation"], "activation"),
        "tie_word_embeddings": s["tied_embeddings"], "scale_decoder_outputs": s["head_scale"] != 1.0,
        "dropout_rate": s["dropout"], "is_encoder_decoder": True,
    }  # fmt: skip


def _t5_side(s: Config, side: str) -> Table:
    layer, names = f"{side}.block.{{n}}.layer", ("q", "k", "v", "o")
    last = 2 if side == "decoder" else 1
    table = [
        Row(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", f"{side}/relative/table"),
        *attention_rows(s, f"{layer}.0.SelfAttention", names, f"{side}/layers/attn"),
        *norm_rows(s, f"{layer}.0.layer_norm", f"{side}/layers/norm_attn"),
        *norm_rows(s, f"{layer}.{last}.layer_norm", f"{side}/layers/norm_mlp"),
        *linear_rows(s, f"{layer}.{last}.DenseReluDense.wo", f"{side}/layers/mlp/out"),
        *norm_rows(s, f"{side}.final_layer_norm", f"{side}/norm_final"),
    ]
    if side == "decoder":
        table += attention_rows(s, f"{layer}.1.EncDecAttention", names, "decoder/layers/cross")
        table += norm_rows(s, f"{layer}.1.layer_norm", "decoder/layers/norm_cross")
    gated = s["activation"] in ("geglu", "swiglu")
    parts = {"wi_0": "gate", "wi_1": "up"} if gated else {"wi": "in"}
    for theirs, ours in parts.items():
        table += linear_rows(s, f"{layer}.{last}.DenseReluDense.{theirs}", f"{side}/layers/mlp/{ours}")
    return table


def _t5_rows(s: Config) -> Table:
    shared = [Tied(f"{side}.embed_tokens.weight", "shared.weight") for side in ("encoder", "decoder")]
    output = []
    if s["head"] == "lm":
        untied = Row("lm_head.weight", "head/kernel", transpose)
        output = [Tied("lm_head.weight", "shared.weight") if s["tied_embeddings"] else untied]
    return [Row("shared.weight", "embed/tokens"), *shared, *_t5_side(s, "encoder"), *_t5_side(s, "decoder"), *output]


# BART (Lewis et al. 2020): post-norm, learned positions behind two rows that are never read.


def _bart_config(c: Config) -> dict[str, Any]:
    f.only(
        c, is_encoder_decoder=True, normalize_before=False, add_final_layer_norm=False,
        static_position_embeddings=False, tie_word_embeddings=True, normalize_embedding=True,
    )  # fmt: skip
    heads, mlp = f.integer(c, "encoder_attention_heads"), f.integer(c, "encoder_ffn_dim")
    f.only(c, decoder_attention_heads=heads)
    width, rate, found = f.integer(c, "d_model"), f.number(c, "dropout", 0.1), head(c)
    return {
        "name": "encoder_decoder", "head": found, "vocab_size": f.integer(c, "vocab_size"), "embed_dim": width,
        "num_layers": f.integer(c, "encoder_layers"), "decoder_layers": f.integer(c, "decoder_layers"),
        "num_heads": heads, "mlp_dim": mlp, "positions": "learned", "position_offset": 2,
        "decoder_mlp_dim": f.integer(c, "decoder_ffn_dim", mlp),
        "max_length": f.integer(c, "max_position_embeddings", 1024), "embed_norm": True,
        "activation": f.pick(c, "activation_function", f.ACTIVATIONS, "gelu"),
        "embed_scale": width**0.5 if c.get("scale_embedding") else 1.0, "head_bias": found == "lm",
        "dropout": rate, "embed_dropout": rate, "attention_dropout": f.number(c, "attention_dropout", 0.0),
    }  # fmt: skip


def _bart_foreign(s: Config) -> dict[str, Any]:
    heads, mlp = s["num_heads"], f.mlp_dim(s)
    return architecture(s, "Bart") | {
        "vocab_size": s["vocab_size"], "d_model": s["embed_dim"], "encoder_layers": s["num_layers"],
        "decoder_layers": s["decoder_layers"] or s["num_layers"], "encoder_attention_heads": heads,
        "decoder_attention_heads": heads, "encoder_ffn_dim": mlp, "decoder_ffn_dim": s["decoder_mlp_dim"] or mlp,
        "max_position_embeddings": s["max_length"], "scale_embedding": s["embed_scale"] != 1.0,
        "activation_function": f.name_of(f.ACTIVATIONS, s["activation"], "activation"), "dropout": s["dropout"],
        "attention_dropout": s["attention_dropout"], "is_encoder_decoder": True,
    }  # fmt: skip


def _bart_side(s: Config, side: str) -> Table:
    layer, ours = f"model.{side}.layers.{{n}}", f"{side}/layers"
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    table = [
        Row(f"model.{side}.embed_positions.weight", f"{side}/embed/positions"),
        *norm_rows(s, f"model.{side}.layernorm_embedding", f"{side}/embed/norm"),
        *attention_rows(s, f"{layer}.self_attn", names, f"{ours}/attn"),
        *norm_rows(s, f"{layer}.self_attn_layer_norm", f"{ours}/norm_attn"),
        *linear_rows(s, f"{layer}.fc1", f"{ours}/mlp/in"),
        *linear_rows(s, f"{layer}.fc2", f"{ours}/mlp/out"),
        *norm_rows(s, f"{layer}.final_layer_norm", f"{ours}/norm_mlp"),
    ]
    if side == "decoder":
        table += attention_rows(s, f"{layer}.encoder_attn", names, f"{ours}/cross")
        table += norm_rows(s, f"{layer}.encoder_attn_layer_norm", f"{ours}/norm_cross")
    return table


def _bart_rows(s: Config) -> Table:
    shared = "model.shared.weight"
    tied = [Tied(f"model.{side}.embed_tokens.weight", shared) for side in ("encoder", "decoder")]
    if s["head"] == "lm":
        tied.append(Tied("lm_head.weight", shared))
    bias = [Row("final_logits_bias", "head/bias", row_vector)] if s["head_bias"] and s["head"] == "lm" else []
    return [Row(shared, "embed/tokens"), *tied, *bias, *_bart_side(s, "encoder"), *_bart_side(s, "decoder")]


MEANINGS = {"encoder_decoder": meaning}

FAMILIES = {
    "t5": Family(
        _t5_config, _t5_foreign, _t5_rows, fit=_t5_fit,
        ignored=(r"EncDecAttention\.relative_attention_bias\.weight$",),
    ),
    "bart": Family(_bart_config, _bart_foreign, _bart_rows, "model."),
}  # fmt: skip
