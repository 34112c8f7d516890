"""Llama and what was built after it: Mistral, Qwen 2 and 3, Gemma 1 to 3.

One table of weights: rotary positions, RMS norms, gated feed-forward layers without biases. What differs is in
the configs: windows and layer patterns, biases of queries, keys and values, norms of queries and keys, norms
scaled by 1 + w, caps of scores and logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from bigmodel_jax.errors import InputError
from bigmodel_jax.hf import family as f
from bigmodel_jax.hf.decoders import attention_rows, head_rows, linear_rows, norm_rows
from bigmodel_jax.hf.family import Config, Family
from bigmodel_jax.hf.rows import Row, Table

MOST_LAYERS = 10_000
LOCAL, FULL = "sliding_attention", "full_attention"
# Ours -> (their names of the bounds, their usual values).
_BOUNDS = {
    "llama3": (("low_freq_factor", "high_freq_factor"), (1.0, 4.0)),
    "yarn": (("beta_slow", "beta_fast"), (1.0, 32.0)),
}
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_GEMMA_ACTIVATIONS = {"gelu_pytorch_tanh": "geglu", "gelu": "geglu"}


def _inner(c: Config, key: str) -> Config:
    value = c.get(key) or {}
    if not isinstance(value, Mapping):
        raise InputError(f"config.json: '{key}' = {value!r} should be an object")
    return value


def rope(c: Config, theta: float = 10_000.0) -> dict[str, Any]:
    """Rotary options of the layers that see all, from the flat form of older configs or from `rope_parameters`.

    Args:
      theta: where the config gives none.

    Raises:
      InputError: a scaling that we do not have.
    """
    parameters = _inner(c, "rope_parameters")
    parameters = _inner(parameters, FULL) or parameters
    scaling = _inner(c, "rope_scaling") or parameters
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = parameters.get("rope_theta", c.get("rope_theta", theta))
    out = {"positions": "rotary", "rope_theta": f.number({"rope_theta": theta}, "rope_theta")}
    if kind == "default":
        return out
    if kind not in ("linear", *_BOUNDS):
        raise InputError(f"config.json: rope_type {kind!r} is not supported, only default, linear, llama3 and yarn")
    out |= {"rope_scaling": kind, "rope_factor": f.number(scaling, "factor")}
    if kind in _BOUNDS:
        names, usual = _BOUNDS[kind]
        bounds = tuple(f.number(scaling, name, default) for name, default in zip(names, usual, strict=True))
        grown = 0.1 * math.log(out["rope_factor"]) + 1.0
        f.only(scaling, truncate=True, attention_factor=grown, mscale=0, mscale_all_dim=0)
        length = c.get("original_max_position_embeddings", c.get("max_position_embeddings"))
        out["rope_original_length"] = f.integer(scaling, "original_max_position_embeddings", length)
        out["rope_bounds"] = () if bounds == usual else bounds
    return out


def foreign_rope(s: Config) -> dict[str, Any]:
    """The flat form, which every version reads."""
    out: dict[str, Any] = {"rope_theta": s["rope_theta"]}
    if s["rope_scaling"] == "none":
        return out
    scaling = {"rope_type": s["rope_scaling"], "factor": s["rope_factor"]}
    if s["rope_scaling"] in _BOUNDS:
        names, usual = _BOUNDS[s["rope_scaling"]]
        scaling |= dict(zip(names, s["rope_bounds"] or usual, strict=True))
        scaling["original_max_position_embeddings"] = s["rope_original_length"]
    return out | {"rope_scaling": scaling}


def pattern(c: Config, usual: str) -> dict[str, Any]:
    """{"window", "layer_pattern"} from `sliding_window` and `layer_types`.

    Args:
      usual: the layers' letters where the config has no `layer_types`, repeated as needed.
    """
    layers, window = _layers(c), c.get("sliding_window")
    types = c.get("layer_types")
    if types is None:
        letters = (usual * layers)[:layers]
    elif isinstance(types, list) and set(types) <= {LOCAL, FULL} and len(types) == layers:
        letters = "".join("l" if kind == LOCAL else "g" for kind in types)
    else:
        raise InputError(f"config.json: 'layer_types' should be {layers} times '{LOCAL}' or '{FULL}'")
    if window is None or "l" not in letters:
        return {"window": 0, "layer_pattern": ""}
    shortest = next(letters[:n] for n in range(1, layers + 1) if (letters[:n] * layers)[:layers] == letters)
    return {"window": f.integer(c, "sliding_window"), "layer_pattern": "" if shortest == "l" else shortest}


def _layers(c: Config) -> int:
    layers = f.integer(c, "num_hidden_layers")
    if layers > MOST_LAYERS:
        raise InputError(f"config.json: 'num_hidden_layers' = {layers} is more than {MOST_LAYERS}")
    return layers


def _layer_types(s: Config) -> list[str]:
    letters = s["layer_pattern"] or ("l" if s["window"] else "g")
    return [LOCAL if letters[n % len(letters)] == "l" else FULL for n in range(s["num_layers"])]


def base_config(c: Config) -> dict[str, Any]:
    """What all of them have, as Llama has it."""
    f.only(c, attention_bias=False, mlp_bias=False, use_bidirectional_attention=False)
    return f.head(c, "lm") | rope(c) | {
        "name": "decoder", "vocab_size": f.integer(c, "vocab_size"), "num_layers": f.integer(c, "num_hidden_layers"),
        "embed_dim": f.integer(c, "hidden_size"), "num_heads": f.integer(c, "num_attention_heads"),
        "num_kv_heads": c.get("num_key_value_heads") or f.integer(c, "num_attention_heads"),
        "head_dim": c.get("head_dim") or 0, "mlp_dim": f.integer(c, "intermediate_size"),
        "max_length": f.integer(c, "max_position_embeddings", 2048), "norm": "rmsnorm", "norm_bias": False,
        "norm_eps": f.number(c, "rms_norm_eps", 1e-6), "bias": False,
        "activation": f.pick(c, "hidden_act", f.GATED, "silu"),
        "tied_embeddings": f.need(c, "tie_word_embeddings", False),
        "attention_dropout": f.number(c, "attention_dropout", 0.0),
    }  # fmt: skip


def base_foreign(s: Config, family: str, activations: dict[str, str] = f.GATED) -> dict[str, Any]:
    """The inverse of `base_config`."""
    return f.architecture(s, family) | foreign_rope(s) | {
        "vocab_size": s["vocab_size"], "num_hidden_layers": s["num_layers"], "hidden_size": s["embed_dim"],
        "num_attention_heads": s["num_heads"], "num_key_value_heads": f.kv_heads(s), "head_dim": f.head_dim(s),
        "intermediate_size": f.mlp_dim(s), "max_position_embeddings": s["max_length"], "rms_norm_eps": s["norm_eps"],
        "hidden_act": f.name_of(activations, s["activation"], "activation"),
        "tie_word_embeddings": s["tied_embeddings"], "attention_dropout": s["attention_dropout"],
        "attention_bias": False,
    }  # fmt: skip


def base_rows(s: Config) -> Table:
    """Two norms in a layer, or Gemma's four; norms of queries and keys where the model has them."""
    layer, ours = "model.layers.{n}", "layers/norm"
    four = s["norm_placement"] == "sandwich"
    table = [
        Row("model.embed_tokens.weight", "embed/tokens"),
        *norm_rows(s, f"{layer}.input_layernorm", f"{ours}_attn"),
        *attention_rows(s, f"{layer}.self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        *norm_rows(s, f"{layer}.post_attention_layernorm", f"{ours}_attn_post" if four else f"{ours}_mlp"),
        *linear_rows(s, f"{layer}.mlp.gate_proj", "layers/mlp/gate"),
        *linear_rows(s, f"{layer}.mlp.up_proj", "layers/mlp/up"),
        *linear_rows(s, f"{layer}.mlp.down_proj", "layers/mlp/out"),
        *norm_rows(s, "model.norm", "norm_final"),
        *head_rows(s, "model.embed_tokens.weight"),
    ]
    if four:
        table += norm_rows(s, f"{layer}.pre_feedforward_layernorm", f"{ours}_mlp")
        table += norm_rows(s, f"{layer}.post_feedforward_layernorm", f"{ours}_mlp_post")
    if s["qk_norm"]:
        table += norm_rows(s, f"{layer}.self_attn.q_norm", "layers/attn/norm_q")
        table += norm_rows(s, f"{layer}.self_attn.k_norm", "layers/attn/norm_k")
    return table


# Mistral 7B (Jiang et al. 2023): grouped queries, and in its first version a window in every layer.


def _mistral_config(c: Config) -> dict[str, Any]:
    return base_config(c) | pattern(c, "l")


def _mistral_foreign(s: Config) -> dict[str, Any]:
    return base_foreign(s, "Mistral") | {"sliding_window": s["window"] or None}


# Qwen 2 (Yang et al. 2024): biases of queries, keys and values. Qwen 3 (2025): norms of queries and keys instead.


def _qwen_config(c: Config) -> dict[str, Any]:
    if not c.get("use_sliding_window"):
        return base_config(c) | {"window": 0}
    layers = _layers(c)
    first = min(int(f.number(c, "max_window_layers", 28)), layers)
    return base_config(c) | pattern(c, "g" * first + "l" * (layers - first))


def _qwen_foreign(s: Config, family: str) -> dict[str, Any]:
    types = _layer_types(s)
    return base_foreign(s, family) | {
        "use_sliding_window": bool(s["window"]), "sliding_window": s["window"] or None, "layer_types": types,
        "max_window_layers": types.index(LOCAL) if LOCAL in types else s["num_layers"],
    }  # fmt: skip


# Gemma (2024), Gemma 2 (2024, section 2), Gemma 3 (2025, section 2).


def _gemma_config(c: Config) -> dict[str, Any]:
    found = c.get("hidden_activation") or c.get("hidden_act", "gelu_pytorch_tanh")
    return base_config({**c, "hidden_act": "gelu_pytorch_tanh"}) | {
        "activation": f.pick({"hidden_activation": found}, "hidden_activation", _GEMMA_ACTIVATIONS),
        "tied_embeddings": f.need(c, "tie_word_embeddings", True),
        "norm_offset": 1.0, "embed_scale": f.integer(c, "hidden_size") ** 0.5,
        "head_dim": f.integer(c, "head_dim", 256),
    }  # fmt: skip


def _gemma_foreign(s: Config, family: str = "Gemma") -> dict[str, Any]:
    out = base_foreign(s, family, _GEMMA_ACTIVATIONS)
    return out | {"hidden_activation": out["hidden_act"]}


def _gemma2_config(c: Config, usual: str = "lg", caps: tuple[float, float] = (50.0, 30.0)) -> dict[str, Any]:
    ours = _gemma_config(c)
    scalar = f.integer(c, "query_pre_attn_scalar", 256)
    given = {key: c.get(key, usual) or 0.0 for key, usual in zip(_CAPS, caps, strict=True)}
    cap, final = (f.number(given, key) for key in _CAPS)
    return ours | pattern({"sliding_window": 4096, **c}, usual) | {
        "norm_placement": "sandwich", "attention_scale": 0.0 if scalar == ours["head_dim"] else scalar**-0.5,
        "attention_softcap": cap, "final_softcap": final,
    }  # fmt: skip


def _gemma2_foreign(s: Config, family: str = "Gemma2") -> dict[str, Any]:
    scale = s["attention_scale"]
    return _gemma_foreign(s, family) | {
        "query_pre_attn_scalar": round(scale**-2) if scale else f.head_dim(s),
        "sliding_window": s["window"] or 4096, "layer_types": _layer_types(s),
        "attn_logit_softcapping": s["attention_softcap"] or None,
        "final_logit_softcapping": s["final_softcap"] or None,
    }  # fmt: skip


def _gemma3_config(c: Config) -> dict[str, Any]:
    period = min(f.integer(c, "sliding_window_pattern", 6), MOST_LAYERS)
    nested = _inner(_inner(c, "rope_parameters"), LOCAL)
    f.only(nested, rope_type="default")
    theta = nested.get("rope_theta", c.get("rope_local_base_freq", 10_000.0))
    ours = _gemma2_config(c, "l" * (period - 1) + "g", (0.0, 0.0)) | rope(c, 1_000_000.0)
    return ours | {"qk_norm": True, "rope_local_theta": f.number({"theta": theta}, "theta")}


def _gemma3_foreign(s: Config) -> dict[str, Any]:
    # Without "Text" the other heads are of the model with images.
    family = "Gemma3" if s["head"] == "lm" else "Gemma3Text"
    return _gemma2_foreign(s, family) | {"rope_local_base_freq": s["rope_local_theta"] or s["rope_theta"]}


def _family(config: Any, foreign: Any) -> Family:
    return Family(config, foreign, base_rows, "model.", ignored=(r"rotary_emb\.inv_freq$",))


FAMILIES = {
    "llama": _family(base_config, lambda s: base_foreign(s, "Llama") | {"mlp_bias": False}),
    "mistral": _family(_mistral_config, _mistral_foreign),
    "qwen2": _family(lambda c: _qwen_config(c) | {"qkv_bias": True}, lambda s: _qwen_foreign(s, "Qwen2")),
    "qwen3": _family(lambda c: _qwen_config(c) | {"qk_norm": True}, lambda s: _qwen_foreign(s, "Qwen3")),
    "gemma": _family(_gemma_config, _gemma_foreign),
    "gemma2": _family(_gemma2_config, _gemma2_foreign),
    "gemma3_text": _family(_gemma3_config, _gemma3_foreign),
}
