"""Published encoders: BERT, RoBERTa, ALBERT."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from bigmodel_jax.errors import InputError
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
    """The linear layer over classes or spans, where there is one."""
    if s["head"] == "none":
        return []
    return dense_rows("qa_outputs" if s["head"] == "spans" else "classifier", "head")


def embed_rows(s: Config, embed: str) -> list[Row]:
    """Tables of tokens, positions and token types below `embed`, and the norm of their sum."""
    return [
        Row(f"{embed}.word_embeddings.weight", "embed/tokens"),
        Row(f"{embed}.position_embeddings.weight", "embed/positions"),
        *[Row(f"{embed}.token_type_embeddings.weight", "embed/types")] * bool(s["token_types"]),
        *norm_rows(s, f"{embed}.LayerNorm", "embed/norm"),
    ]


def mlm_rows(s: Config, dense: str, norm: str, bias: str, output: str, embed: str) -> list[Row | Tied]:
    """Dense layer, norm and output matrix of a masked LM; the bias is kept under two names."""
    tied = s["tied_embeddings"]
    return [
        Row(f"{dense}.weight", "head/dense", transpose),
        Row(f"{dense}.bias", "head/dense_bias"),
        *norm_rows(s, norm, "head/norm"),
        Row(bias, "head/bias"),
        Tied(f"{output}.bias", bias),
        Tied(f"{output}.weight", embed) if tied else Row(f"{output}.weight", "head/kernel", transpose),
    ]


def _bert_rows(s: Config) -> Table:
    table = [*embed_rows(s, "bert.embeddings"), *bert_layer_rows(s, "bert.encoder.layer.{n}")]
    if s["pooler"]:
        table += dense_rows("bert.pooler.dense", "pooler")
    if s["nsp"]:
        table += dense_rows("cls.seq_relationship", "nsp")
    if s["head"] != "lm":
        return table + class_rows(s)
    base = "cls.predictions"
    return table + mlm_rows(
        s, f"{base}.transform.dense", f"{base}.transform.LayerNorm", f"{base}.bias", f"{base}.decoder",
        "bert.embeddings.word_embeddings.weight",
    )  # fmt: skip


# RoBERTa (Liu et al. 2019): positions start behind the padding token's, no next-sentence head.


def _roberta_config(c: Config) -> dict[str, Any]:
    offset = int(f.number(c, "pad_token_id", 1)) + 1
    ours = _bert_config(c)
    ours |= {"position_offset": offset, "max_length": ours["max_length"] - offset}
    if ours["head"] == "lm" and ours["activation"] != "gelu_exact":
        raise InputError(f"config.json: 'hidden_act' = {c['hidden_act']!r} is supported with other heads only")
    return ours | {"nsp": False}


def _roberta_foreign(s: Config) -> dict[str, Any]:
    return _bert_foreign(s) | f.architecture(s, "Roberta", "ForMaskedLM") | {
        "pad_token_id": s["position_offset"] - 1, "max_position_embeddings": s["max_length"] + s["position_offset"],
    }  # fmt: skip


def _roberta_fit(s: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    pooler = any(name.endswith("pooler.dense.weight") for name in names)
    return s if s["head"] == "classes" else s | {"pooler": pooler}


def _roberta_rows(s: Config) -> Table:
    table = [*embed_rows(s, "roberta.embeddings"), *bert_layer_rows(s, "roberta.encoder.layer.{n}")]
    if s["head"] == "classes":
        return [*table, *dense_rows("classifier.dense", "pooler"), *dense_rows("classifier.out_proj", "head")]
    if s["pooler"]:
        table += dense_rows("roberta.pooler.dense", "pooler")
    if s["head"] != "lm":
        return table + class_rows(s)
    return table + mlm_rows(
        s, "lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder",
        "roberta.embeddings.word_embeddings.weight",
    )  # fmt: skip


# ALBERT (Lan et al. 2020): one layer for all, a narrow token table, sentence order instead of next sentence.


def _albert_config(c: Config) -> dict[str, Any]:
    f.only(c, num_hidden_groups=1, inner_group_num=1)
    dropout = f.number(c, "hidden_dropout_prob", 0.0)
    ours = _bert_config({"hidden_act": "gelu_new", "attention_probs_dropout_prob": 0.0, **c}) | {
        "shared_layers": True, "token_dim": f.integer(c, "embedding_size", 128), "dropout": dropout,
        "embed_dropout": dropout, "head_dropout": f.number(c, "classifier_dropout_prob", 0.1),
    }  # fmt: skip
    if ours["token_dim"] == ours["embed_dim"]:
        raise InputError("config.json: 'embedding_size' = 'hidden_size' is not supported: the table has no projection")
    return ours


def _albert_foreign(s: Config) -> dict[str, Any]:
    return _bert_foreign(s) | f.architecture(s, "Albert", "ForPreTraining" if s["nsp"] else "ForMaskedLM") | {
        "embedding_size": s["token_dim"] or s["embed_dim"], "num_hidden_groups": 1, "inner_group_num": 1,
        "classifier_dropout_prob": s["head_dropout"],
    }  # fmt: skip


def _albert_fit(s: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    pooler = any(name.endswith("pooler.weight") for name in names)
    return s | {"pooler": pooler, "nsp": any(name.startswith("sop_classifier.") for name in names)}


def _albert_rows(s: Config) -> Table:
    inner = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    table = [
        *embed_rows(s, "albert.embeddings"),
        Row("albert.encoder.embedding_hidden_mapping_in.weight", "embed/project", transpose),
        Row("albert.encoder.embedding_hidden_mapping_in.bias", "embed/project_bias"),
        *attention_rows(s, f"{inner}.attention", ("query", "key", "value", "dense"), "layer/attn"),
        *norm_rows(s, f"{inner}.attention.LayerNorm", "layer/norm_attn"),
        *linear_rows(s, f"{inner}.ffn", "layer/mlp/in"),
        *linear_rows(s, f"{inner}.ffn_output", "layer/mlp/out"),
        *norm_rows(s, f"{inner}.full_layer_layer_norm", "layer/norm_mlp"),
    ]
    if s["pooler"]:
        table += dense_rows("albert.pooler", "pooler")
    if s["nsp"]:
        table += dense_rows("sop_classifier.classifier", "nsp")
    if s["head"] != "lm":
        return table + class_rows(s)
    return table + mlm_rows(
        s, "predictions.dense", "predictions.LayerNorm", "predictions.bias", "predictions.decoder",
        "albert.embeddings.word_embeddings.weight",
    )  # fmt: skip


FAMILIES = {
    "bert": Family(
        _bert_config, _bert_foreign, _bert_rows, "bert.",
        ignored=(r"embeddings\.position_ids$",),
        renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
        fit=_bert_fit,
    ),
    "roberta": Family(
        _roberta_config, _roberta_foreign, _roberta_rows, "roberta.",
        ignored=(r"embeddings\.position_ids$",), fit=_roberta_fit,
    ),
    "albert": Family(
        _albert_config, _albert_foreign, _albert_rows, "albert.",
        ignored=(r"embeddings\.position_ids$",), fit=_albert_fit,
    ),
}  # fmt: skip
