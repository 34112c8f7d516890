"""Published image models: ResNet (v1 and v1.5) and ViT."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from bigmodel_jax.errors import InputError
from bigmodel_jax.hf import family as f
from bigmodel_jax.hf.decoders import attention_rows, linear_rows, norm_rows
from bigmodel_jax.hf.family import Config, Family
from bigmodel_jax.hf.rows import Layout, Row, Table, transpose
from bigmodel_jax.models.resnet import IMAGENET, resolved

# A convolution's kernel: [O, C, K, K] <-> [K, K, C, O].
kernel = Layout(lambda x: (x.transpose(2, 3, 1, 0),), lambda x: (x.transpose(3, 2, 0, 1),))


def _classes(c: Config, names: str, legal: dict[str, str]) -> dict[str, Any]:
    """{"head", "num_classes"} of "architectures", {what follows `names`: head}; absent is the first."""
    found = str((c.get("architectures") or [names + next(iter(legal))])[0]).removeprefix(names)
    if found not in legal:
        known = ", ".join(names + end for end in legal)
        raise InputError(f"config.json: architecture {names + found!r} is not supported; known: {known}")
    if legal[found] == "none":
        return {"head": "none"}
    return {"head": "classes", "num_classes": f.num_classes(c)}


# ResNet (He et al. 2015). Its "downsample_in_bottleneck" is v1 proper, without it v1.5.


def _sizes(c: Config, key: str) -> tuple[int, ...]:
    """A list of sizes, one per stage."""
    found = f.need(c, key)
    if not isinstance(found, (list, tuple)) or not 0 < len(found) < 16:
        raise InputError(f"config.json: '{key}' = {str(found)[:60]} should list a size per stage")
    return tuple(f.integer({key: size}, key) for size in found)


def _resnet_config(c: Config) -> dict[str, Any]:
    f.only(c, hidden_act="relu", downsample_in_first_stage=False)
    block = f.pick(c, "layer_type", {"basic": "basic", "bottleneck": "bottleneck"}, "bottleneck")
    blocks, sizes = _sizes(c, "depths"), _sizes(c, "hidden_sizes")
    channels, wide = f.integer(c, "embedding_size", 64), 4 if block == "bottleneck" else 1
    if sizes != (expected := tuple(channels * wide * 2**n for n in range(len(blocks)))):
        raise InputError(f"config.json: 'hidden_sizes' = {list(sizes)} is not supported here, only {list(expected)}")
    if sum(blocks) > 1000:
        raise InputError(f"config.json: 'depths' = {list(blocks)} is no network")
    v1 = f.pick(c, "downsample_in_bottleneck", {False: False, True: True}, False)
    section = {"name": "resnet", "version": "v1" if v1 else "v1.5", "in_channels": f.integer(c, "num_channels", 3)}
    section["num_classes"] = _classes(c, "ResNet", {"ForImageClassification": "classes"})["num_classes"]
    published = [depth for depth, network in IMAGENET.items() if network == (block, blocks)]
    if published and channels == 64:
        return section | {"depth": published[0]}
    depth = 18 if block == "basic" else 50
    return section | {"depth": depth, "block": block, "blocks": blocks, "channels": channels}


def resnet_meaning(s: Config) -> dict[str, Any]:
    """A model section with the options that only abbreviate others spelled out, so that equal networks are equal."""
    names = ("depth", "block", "blocks", "channels", "width", "stem", "projection")
    block, blocks, channels, stem, projection = resolved(*(s[name] for name in names))
    out = {name: value for name, value in s.items() if name not in names}
    if s["norm"] == "batch":
        out.pop("gn_groups", None)
    if block == "basic" and s["version"] == "v1":
        out["version"] = "v1.5"  # the same without a bottleneck
    return out | {
        "block": block, "blocks": tuple(blocks), "channels": channels, "stem": stem, "projection": projection,
    }  # fmt: skip


def _resnet_foreign(s: Config) -> dict[str, Any]:
    m = resnet_meaning(s)
    if min(m["blocks"]) < 1:
        raise InputError(f"blocks {m['blocks']}: a published ResNet has at least one block in every stage")
    wide = 4 if m["block"] == "bottleneck" else 1
    return f.labels(f.numbered(s["num_classes"])) | {
        "architectures": ["ResNetForImageClassification"], "num_channels": s["in_channels"],
        "embedding_size": m["channels"], "layer_type": m["block"], "hidden_act": "relu", "depths": list(m["blocks"]),
        "hidden_sizes": [m["channels"] * wide * 2**n for n in range(len(m["blocks"]))],
        "downsample_in_first_stage": False, "downsample_in_bottleneck": m["version"] == "v1",
    }  # fmt: skip


def _resnet_rows(s: Config) -> Table:
    m = resnet_meaning(s)
    rows: list[Row] = []

    def convolution(foreign: str, conv: str, norm: str) -> None:
        name = f"resnet.{foreign}.normalization"
        rows.append(Row(f"resnet.{foreign}.convolution.weight", f"{conv}/kernel", kernel))
        rows.extend(Row(f"{name}.{a}", f"{norm}/{b}") for a, b in (("weight", "scale"), ("bias", "bias")))
        rows.extend(Row(f"{name}.running_{a}", f"stats/{norm}/{a}") for a in ("mean", "var"))

    convolution("embedder.embedder", "stem/conv", "stem/norm")
    for stage, count in enumerate(m["blocks"]):
        for block in range(count):
            foreign, path = f"encoder.stages.{stage}.layers.{block}", f"stages/{stage + 1}/block{block + 1}"
            for n in range(3 if m["block"] == "bottleneck" else 2):
                convolution(f"{foreign}.layer.{n}", f"{path}/conv{n + 1}", f"{path}/norm{n + 1}")
            if block == 0 and (stage > 0 or m["block"] == "bottleneck"):
                convolution(f"{foreign}.shortcut", f"{path}/project", f"{path}/project_norm")
    return [*rows, Row("classifier.1.weight", "head/kernel", transpose), Row("classifier.1.bias", "head/bias")]


def _counters(names: Collection[str]) -> dict[str, np.ndarray]:
    """Batches seen by each norm, which only a reference without momentum reads."""
    means = (name for name in names if name.endswith("running_mean"))
    return {name.replace("running_mean", "num_batches_tracked"): np.zeros((), np.int64) for name in means}


# ViT (Dosovitskiy et al. 2021).


def _side(c: Config, key: str, default: int) -> int:
    """A square's side, given as one number or as two equal ones."""
    value = f.need(c, key, default)
    if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return f.integer({key: value}, key)


def _vit_config(c: Config) -> dict[str, Any]:
    f.only(c, pooler_act="tanh", pooler_output_size=c.get("hidden_size"))
    found = _classes(c, "ViT", {"ForImageClassification": "classes", "Model": "none"})
    dropout = f.number(c, "hidden_dropout_prob", 0.0)
    return found | {
        "name": "vit", "in_channels": f.integer(c, "num_channels", 3), "image_size": _side(c, "image_size", 224),
        "patch_size": _side(c, "patch_size", 16), "num_layers": f.integer(c, "num_hidden_layers", 12),
        "embed_dim": f.integer(c, "hidden_size", 768), "num_heads": f.integer(c, "num_attention_heads", 12),
        "mlp_dim": f.integer(c, "intermediate_size", 3072), "norm_eps": f.number(c, "layer_norm_eps", 1e-12),
        "activation": f.pick(c, "hidden_act", f.ACTIVATIONS, "gelu"), "pooler": found["head"] == "none",
        "qkv_bias": f.pick(c, "qkv_bias", {True: True, False: False}, True), "dropout": dropout,
        "embed_dropout": dropout, "attention_dropout": f.number(c, "attention_probs_dropout_prob", 0.0),
    }  # fmt: skip


def _vit_fit(s: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A file of the bare model may lack the pooler."""
    return s | {"pooler": any(name.endswith("pooler.dense.weight") for name in names)}


def _vit_foreign(s: Config) -> dict[str, Any]:
    end = {"classes": "ForImageClassification", "none": "Model"}[s["head"]]
    named = f.labels(f.numbered(s["num_classes"])) if s["head"] == "classes" else {}
    return named | {
        "architectures": [f"ViT{end}"], "num_channels": s["in_channels"], "image_size": s["image_size"],
        "patch_size": s["patch_size"], "num_hidden_layers": s["num_layers"], "hidden_size": s["embed_dim"],
        "num_attention_heads": s["num_heads"], "intermediate_size": f.mlp_dim(s), "layer_norm_eps": s["norm_eps"],
        "hidden_act": f.name_of(f.ACTIVATIONS, s["activation"], "activation"), "qkv_bias": s["qkv_bias"],
        "hidden_dropout_prob": s["dropout"], "attention_probs_dropout_prob": s["attention_dropout"],
    }  # fmt: skip


def _at_front(count: int) -> Layout:
    """`count` axes of size 1 before the foreign tensor's."""
    lead = (np.newaxis,) * count
    return Layout(lambda x: (x.reshape(x.shape[count:]),), lambda x: (x[lead],))


def _vit_rows(s: Config) -> Table:
    s = {**s, "num_kv_heads": 0, "norm_bias": True, "bias": True}
    names = ("attention.query", "attention.key", "attention.value", "output.dense")
    layer, embeddings = "vit.encoder.layer.{n}", "vit.embeddings"
    rows = [
        Row(f"{embeddings}.cls_token", "class_token", _at_front(2)),
        Row(f"{embeddings}.position_embeddings", "positions", _at_front(1)),
        Row(f"{embeddings}.patch_embeddings.projection.weight", "patches/kernel", kernel),
        Row(f"{embeddings}.patch_embeddings.projection.bias", "patches/bias"),
        *attention_rows(s, f"{layer}.attention", names),
        *norm_rows(s, f"{layer}.layernorm_before", "layers/norm_attn"),
        *norm_rows(s, f"{layer}.layernorm_after", "layers/norm_mlp"),
        *linear_rows(s, f"{layer}.intermediate.dense", "layers/mlp/in"),
        *linear_rows(s, f"{layer}.output.dense", "layers/mlp/out"),
        *norm_rows(s, "vit.layernorm", "norm_final"),
    ]
    dense = {"vit.pooler.dense": "pooler"} if s["pooler"] else {}
    dense |= {"classifier": "head"} if s["head"] == "classes" else {}
    for foreign, path in dense.items():
        rows += [Row(f"{foreign}.weight", f"{path}/kernel", transpose), Row(f"{foreign}.bias", f"{path}/bias")]
    return rows


# Sections of these models, spelled out before they are compared.
MEANINGS: dict[str, Callable[[Config], dict[str, Any]]] = {"resnet": resnet_meaning}

FAMILIES = {
    "resnet": Family(
        _resnet_config, _resnet_foreign, _resnet_rows, "resnet.",
        ignored=(r"\.num_batches_tracked$",), constants=_counters,
    ),
    "vit": Family(_vit_config, _vit_foreign, _vit_rows, "vit.", fit=_vit_fit),
}  # fmt: skip
