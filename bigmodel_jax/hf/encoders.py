"""Published encoders: BERT."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from bigmodel_jax.hf import family as f
from bigmodel_jax.hf.decoders import attention_rows, linear_rows, norm_rows
from bigmodel_jax.hf.family import Config, Family
from bigmodel_jax.hf.rows import Row, Table, Tied, transpose

HEADS = ("lm", "classes", "tokens", "spans", "none")

# BERT (Devlin et al. 2019).


def _bert_config(c: Config) -> dict[str, Any]:
    f.only(c, position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    found = f.head(c, "none", HEADS)
    dropout = f.number(c, "hidden_dropout_prob", 0.1)
    return found | {
        "name": "encoder", "vocab_size": f.integer(c, "vocab_size"), "num_layers": f.integer(c, "num_hidden_layers"),
        "embed_dim": f.integer(c, "hidden_size"), "num_heads": f.integer(c, "num_attention_heads"),
        "mlp_dim": f.integer(c, "intermediate_size"), "max_length": f.integer(c, "max_position_embeddings", 512),
        "token_types": f.integer(c, "type_vocab_size", 2), "norm_eps": f.number(c, "layer_norm_eps", 1e-12),
        "activation": f.pick(c, "hidden_act", f.ACTIVATIONS, "gelu"),
        "tied_embeddings": f.need(c, "tie_word_embeddings", True) or found["head"] != "lm",
        "pooler": found["head"] in ("classes", "none") or "ForPreTraining" in str(c.get("architectures")),
        "nsp": "ForPreTraining" in str(c.get("architectures")),
        "dropout": dropout, "embed_dropout": dropout,
        "attention_dropout": f.number(c, "attention_probs_dropout_prob", 0.1),
        "head_dropout": dropout if c.get("classifier_dropout") is None else f.number(c, "classifier_dropout"),
    }  # fmt: skip


def _bert_fit(s: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Many published files keep the pooler and the next-sentence head whatever their architecture."""
    pooler = any(name.endswith("pooler.dense.weight") for name in names)
    nsp = any(name.startswith("cls.seq_relationship.") for name in names)
    if s["head"] == "none" and any(name.startswith("cls.predictions.") for name in names):
        s = s | {"head": "lm"}
    return s | {"pooler": pooler, "nsp": nsp and s["head"] == "lm"}


def _bert_foreign(s: Config) -> dict[str, Any]:
    return f.architecture(s, "Bert", "ForPreTraining" if s["nsp"] else "ForMaskedLM") | {
        "vocab_size": s["vocab_size"], "num_hidden_layers": s["num_layers"], "hidden_size": s["embed_dim"],
        "num_attention_heads": s["num_heads"], "intermediate_size": f.mlp_dim(s), "type_vocab_size": s["token_types"],
        "max_position_embeddings": s["max_length"], "layer_norm_eps": s["norm_eps"],
        "hidden_act": f.name_of(f.ACTIVATIONS, s["activation"], "activation"),
        "tie_word_embeddings": s["tied_embeddings"], "hidden_dropout_prob": s["dropout"],
        "attention_probs_dropout_prob": s["attention_dropout"], "classifier_dropout": s["head_dropout"],
    }  # fmt: skip


def bert_layer_rows(s: Config, layer: str) -> list[Row]:
    """One post-norm layer with BERT's names below `layer`."""
    names = ("self.query", "self.key", "self.value", "output.dense")
    return [
        *attention_rows(s, f"{layer}.attention", names),
        *norm_rows(s, f"{layer}.attention.output.LayerNorm", "layers/norm_attn"),
        *linear_rows(s, f"{layer}.intermediate.dense", "layers/mlp/in"),
        *linear_rows(s, f"{layer}.output.dense", "layers/mlp/out"),
        *norm_rows(s, f"{layer}.output.LayerNorm", "layers/norm_mlp"),
    ]


def dense_rows(foreign: str, ours: str) -> list[Row]:
    """A linear layer with a bias, ours named kernel and bias."""
    return [Row(f"{foreign}.weight", f"{ours}/kernel", transpose), Row(f"{foreign}.bias", f"{ours}/bias")]


def class_rows(s: Config) -> list[Row]:
    """The linear layer over classes or spans."""
    return dense_rows("qa_outputs" if s["head"] == "spans" else "classifier", "head")


def _bert_rows(s: Config) -> Table:
    table: list[Row | Tied] = [
        Row("bert.embeddings.word_embeddings.weight", "embed/tokens"),
        Row("bert.embeddings.position_embeddings.weight", "embed/positions"),
        Row("bert.embeddings.token_type_embeddings.weight", "embed/types"),
        *norm_rows(s, "bert.embeddings.LayerNorm", "embed/norm"),
        *bert_layer_rows(s, "bert.encoder.layer.{n}"),
    ]
    if s["pooler"]:
        table += dense_rows("bert.pooler.dense", "pooler")
    if s["nsp"]:
        table += dense_rows("cls.seq_relationship", "nsp")
    if s["head"] != "lm":
        return table + (class_rows(s) if s["head"] != "none" else [])
    table += [
        Row("cls.predictions.transform.dense.weight", "head/dense", transpose),
        Row("cls.predictions.transform.dense.bias", "head/dense_bias"),
        *norm_rows(s, "cls.predictions.transform.LayerNorm", "head/norm"),
        Row("cls.predictions.bias", "head/bias"),
        Tied("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ]
    output = "cls.predictions.decoder.weight"
    if s["tied_embeddings"]:
        return [*table, Tied(output, "bert.embeddings.word_embeddings.weight")]
    return [*table, Row(output, "head/kernel", transpose)]


FAMILIES = {
    "bert": Family(
        _bert_config, _bert_foreign, _bert_rows, "bert.",
        ignored=(r"embeddings\.position_ids$",),
        renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
        fit=_bert_fit,
    ),
}  # fmt: skip
