"""The published config.json of one model of each family: its parameters counted, its table complete, there and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bigmodel_jax import tree
from bigmodel_jax.errors import InputError
from bigmodel_jax.hf import FAMILIES, published
from bigmodel_jax.hf.rows import Plan
from bigmodel_jax.models.spec import Spec
from tests.parity.families import CASES
from tests.parity.recorded import code_hash, due

LOCAL, FULL = "sliding_attention", "full_attention"


def llama(kind: str, vocab: int, width: int, layers: int, heads: int, groups: int, mlp: int, **more) -> dict:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "intermediate_size")  # fmt: skip
    sizes = dict(zip(names, (vocab, width, layers, heads, groups, mlp), strict=True))
    return {"model_type": kind, "rms_norm_eps": 1e-6, "hidden_act": "silu"} | sizes | more


def bert(kind: str, vocab: int, **more) -> dict:
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    rest = {"model_type": kind, "vocab_size": vocab, "hidden_act": "gelu", "max_position_embeddings": 512}
    return rest | sizes | more


LLAMA31 = llama(
    "llama", 128256, 4096, 32, 32, 8, 14336, max_position_embeddings=131072, rope_theta=500000.0,
    rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 8192},
)  # fmt: skip
GEMMA = {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192}
GEMMA2 = llama("gemma2", 256000, 2304, 26, 8, 4, 9216, **GEMMA, hidden_activation="gelu_pytorch_tanh",
               query_pre_attn_scalar=256, sliding_window=4096, attn_logit_softcapping=50.0,
               final_logit_softcapping=30.0)  # fmt: skip
GEMMA3 = llama("gemma3_text", 262144, 1152, 26, 4, 1, 6912, head_dim=256, hidden_activation="gelu_pytorch_tanh",
               max_position_embeddings=32768, query_pre_attn_scalar=256, sliding_window=512, rope_theta=1000000,
               sliding_window_pattern=6, rope_local_base_freq=10000, final_logit_softcapping=None)  # fmt: skip
OPT = {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048, "activation_function": "relu"}
T5 = {"model_type": "t5", "vocab_size": 32128, "d_model": 512, "d_kv": 64}

# Parameters as the model cards and the released files have them; tied matrices once.
PUBLISHED = {
    "gpt2": (124_439_808, {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12,
                           "n_positions": 1024}),
    "opt-125m": (125_239_296, OPT | {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                                     "ffn_dim": 3072, "word_embed_proj_dim": 768}),
    "opt-350m": (331_196_416, OPT | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                                     "ffn_dim": 4096, "word_embed_proj_dim": 512, "do_layer_norm_before": False}),
    "pythia-70m": (70_426_624, {"model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 512,
                                "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048,
                                "hidden_act": "gelu", "rotary_pct": 0.25, "rotary_emb_base": 10000}),
    "bloom-560m": (559_214_592, {"model_type": "bloom", "vocab_size": 250880, "n_embed": 1024, "n_layer": 24,
                                 "num_attention_heads": 16, "seq_length": 2048}),
    "llama-3.1-8b": (8_030_261_248, LLAMA31),
    "mistral-7b": (7_241_732_096, llama("mistral", 32000, 4096, 32, 32, 8, 14336, sliding_window=4096,
                                        max_position_embeddings=32768)),
    "qwen2-0.5b": (494_032_768, llama("qwen2", 151936, 896, 24, 14, 2, 4864, tie_word_embeddings=True,
                                      rope_theta=1000000.0, use_sliding_window=False, sliding_window=131072)),
    "qwen3-0.6b": (596_049_920, llama("qwen3", 151936, 1024, 28, 16, 8, 3072, head_dim=128, rope_theta=1000000,
                                      tie_word_embeddings=True, sliding_window=None)),
    "gemma-2b": (2_506_172_416, llama("gemma", 256000, 2048, 18, 8, 1, 16384, **GEMMA)),
    "gemma-2-2b": (2_614_341_888, GEMMA2),
    "gemma-3-1b": (999_885_952, GEMMA3),
    "bert-base": (109_482_240, bert("bert", 30522, architectures=["BertModel"])),
    "roberta-base": (124_697_433, bert("roberta", 50265, max_position_embeddings=514, type_vocab_size=1,
                                       architectures=["RobertaForMaskedLM"], pad_token_id=1)),
    "albert-base-v2": (11_683_584, bert("albert", 30000, embedding_size=128, hidden_act="gelu_new",
                                        architectures=["AlbertModel"])),
    "t5-small": (60_506_624, T5 | {"d_ff": 2048, "num_layers": 6, "num_heads": 8}),
    "t5-v1.1-small": (76_961_152, T5 | {"d_ff": 1024, "num_layers": 8, "num_heads": 6, "tie_word_embeddings": False,
                                        "feed_forward_proj": "gated-gelu"}),
    # 139,420,416 parameters, and the bias of the logits, which is stored but not trained there.
    "bart-base": (139_420_416 + 50265, {
        "model_type": "bart", "vocab_size": 50265, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6,
        "encoder_attention_heads": 12, "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072,
        "max_position_embeddings": 1024}),
    "mixtral-8x7b": (46_702_792_704, llama("mixtral", 32000, 4096, 32, 32, 8, 14336, num_local_experts=8,
                                           rope_theta=1000000.0, max_position_embeddings=32768)),
}  # fmt: skip


def section_of(config: dict) -> dict:
    return published.complete(FAMILIES[config["model_type"]].config(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_parameters_and_a_name_for_each(name):
    count, config = PUBLISHED[name]
    section = section_of(config)
    shapes = published.shapes_of(published.build(section))
    assert tree.count(shapes) == count
    plan = Plan(FAMILIES[config["model_type"]].rows(section), shapes)
    assert sum(int(np.prod(shape)) for shape in plan.foreign.values()) == count
    kind, said = published.express(section)
    assert kind == config["model_type"]
    assert published._canonical(section_of(said | {"model_type": kind})) == published._canonical(section)
    other = config | {"vocab_size": config["vocab_size"] + 1}
    assert tree.count(published.shapes_of(published.build(section_of(other)))) != count


def test_layer_patterns_and_rotations_are_what_the_papers_say():
    gemma2, gemma3 = (Spec(**{k: v for k, v in section_of(c).items() if k != "name"}) for c in (GEMMA2, GEMMA3))
    assert gemma2.local == (True, False) * 13
    assert gemma3.local == tuple((n + 1) % 6 != 0 for n in range(26))
    assert (gemma3.rope_theta, gemma3.rope_local_theta, gemma3.window) == (1e6, 1e4, 512)
    assert (gemma2.attention_softcap, gemma2.final_softcap, gemma2.embed_scale) == (50.0, 30.0, 48.0)
    qwen = llama("qwen2", 100, 16, 5, 4, 2, 16, use_sliding_window=True, sliding_window=8, max_window_layers=3)
    assert section_of(qwen)["layer_pattern"] == "gggll"
    assert section_of(qwen | {"use_sliding_window": False})["window"] == 0


def test_nested_and_flat_rotations_are_the_same_model():
    """Configs written by transformers 5 and by older versions."""
    flat = dict(GEMMA3, rope_scaling={"rope_type": "linear", "factor": 8.0})
    new = {key: value for key, value in GEMMA3.items() if not key.startswith("rope") and "pattern" not in key}
    new |= {
        "rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000},
                            LOCAL: {"rope_type": "default", "rope_theta": 10000.0}},
        "layer_types": [FULL if n % 6 == 5 else LOCAL for n in range(26)],
    }  # fmt: skip
    assert section_of(new) == section_of(flat) != section_of(GEMMA3)
    rope = {**LLAMA31["rope_scaling"], "rope_theta": 500000.0}
    nested = {key: value for key, value in LLAMA31.items() if not key.startswith("rope")}
    assert section_of(nested | {"rope_parameters": rope}) == section_of(LLAMA31)


REFUSED = {
    "longrope": ("llama-3.1-8b", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope.*llama3 and yarn"),
    "scaling": ("llama-3.1-8b", {"rope_scaling": [2.0]}, "rope_scaling.*should be an object"),
    "yarn": ("llama-3.1-8b", {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale.*0.7"),
    "bias": ("llama-3.1-8b", {"attention_bias": True}, "attention_bias"),
    "types": ("gemma-2-2b", {"layer_types": [FULL]}, "26 times"),
    "layers": ("mistral-7b", {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers"),
    "scalar": ("gemma-2-2b", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    "cap": ("gemma-2-2b", {"attn_logit_softcapping": "high"}, "attn_logit_softcapping"),
    "bidirectional": ("gemma-3-1b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "groups": ("albert-base-v2", {"num_hidden_groups": 2}, "num_hidden_groups"),
    "no projection": ("albert-base-v2", {"embedding_size": 768}, "embedding_size"),
    "final norm": ("opt-125m", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    "residual": ("bloom-560m", {"apply_residual_connection_post_layernorm": True}, "post_layernorm"),
    "neox scaling": ("pythia-70m", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    "head": ("opt-350m", {"architectures": ["OPTForSequenceClassification"]}, "word_embed_proj_dim"),
    "theta": ("llama-3.1-8b", {"rope_theta": "much"}, "rope_theta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_we_do_not_have_is_refused_by_name(name):
    model, changes, words = REFUSED[name]
    with pytest.raises(InputError, match=words):
        section_of(PUBLISHED[model][1] | changes)


def test_every_case_of_parity_is_recorded_and_met_its_goal():
    """With whichever code: a run of tests/parity says which rows are stale."""
    root = Path(__file__).resolve().parents[2]
    rows = json.loads((root / "results/parity.json").read_text())["cases"]
    assert rows.keys() == CASES.keys() and all(row["ok"] for row in rows.values())


def test_a_row_of_other_code_or_versions_is_due(tmp_path):
    for folder in ("bigmodel_jax/models", "bigmodel_jax/hf", "bigmodel_jax/data", "tests/parity"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("1")
    before = {"code": code_hash(tmp_path), "jax": "1"}
    (tmp_path / "bigmodel_jax/data/a.py").write_text("2")
    assert code_hash(tmp_path) == before["code"]  # no row depends on it
    rows = {"a": {"ok": True, "made_with": before}, "b": {"ok": False, "made_with": before}, "c": {"ok": True}}
    assert due(rows, "abcd", before) == ["b", "c", "d"]
    assert due(rows, "ab", before | {"jax": "2"}) == ["a", "b"]
    (tmp_path / "bigmodel_jax/hf/a.py").write_text("2")
    assert due(rows, "a", {"code": code_hash(tmp_path), "jax": "1"}) == ["a"]
