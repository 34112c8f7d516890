"""What is compared: for every family, small references of `transformers` that use each of its options.

A case is (class, config leaves, kind of input). A new family is a row here.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Case(NamedTuple):
    """reference: name of a class in transformers. config: leaves of its config. kind: see `inputs` in run.py."""

    reference: str
    config: dict[str, Any]
    kind: str = "decoder"
    model: dict[str, Any] = {}


VOCAB = 61
_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 500_000.0,
}  # fmt: skip
_ROPE = {"rope_theta": 500.0, "factor": 4.0}
_OPT = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 4,
    "max_position_embeddings": 40,
}  # fmt: skip
_BART = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3,
    "num_heads": 4, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10,
}  # fmt: skip
_RESNET = {"num_channels": 3, "embedding_size": 8, "depths": [2, 1, 2], "num_labels": 5}
_BASIC = _RESNET | {"layer_type": "basic", "hidden_sizes": [8, 16, 32]}
_BOTTLENECK = _RESNET | {"layer_type": "bottleneck", "hidden_sizes": [32, 64, 128]}
_VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
    "patch_size": 4, "num_channels": 3,
}  # fmt: skip

CASES: dict[str, Case] = {
    "gpt2": Case("GPT2LMHeadModel", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}),
    "opt": Case("OPTForCausalLM", {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 4,
        "max_position_embeddings": 40, "word_embed_proj_dim": 32,
    }),
    "opt, narrow table, post-norm": Case("OPTForCausalLM", _OPT | {
        "word_embed_proj_dim": 16, "do_layer_norm_before": False, "activation_function": "gelu",
    }),
    "opt, classes": Case("OPTForSequenceClassification", _OPT | {
        "num_labels": 3, "pad_token_id": 1}, "decoder classes"),
    "gpt_neox": Case("GPTNeoXForCausalLM", {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64, "rope_parameters": {
            "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    }),
    "gpt_neox, sequential": Case("GPTNeoXForCausalLM", _OPT | {
        "intermediate_size": 48, "use_parallel_residual": False, "tie_word_embeddings": True,
    }),
    "bloom": Case("BloomForCausalLM", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "llama": Case("LlamaForCausalLM", _LLAMA),
    "llama 3, scaled rope": Case("LlamaForCausalLM", _LLAMA | {"rope_parameters": _LLAMA3, "rms_norm_eps": 1e-5}),
    "llama, tied, classes": Case(
        "LlamaForSequenceClassification", _LLAMA | {"num_labels": 3, "tie_word_embeddings": True}, "decoder classes"
    ),
    "llama, linear rope": Case("LlamaForCausalLM", _LLAMA | {"rope_parameters": _ROPE | {"rope_type": "linear"}}),
    "llama, yarn": Case("LlamaForCausalLM", _LLAMA | {
        "rope_parameters": _ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 16},
    }),
    "mistral, window": Case("MistralForCausalLM", _LLAMA | {"sliding_window": 5}),
    "qwen2": Case("Qwen2ForCausalLM", _LLAMA),
    "qwen2, windows behind": Case("Qwen2ForCausalLM", _LLAMA | {
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2,
    }),
    "qwen3": Case("Qwen3ForCausalLM", _LLAMA | {"head_dim": 16}),
    "gemma": Case("GemmaForCausalLM", _LLAMA | {"head_dim": 16}),
    "gemma2": Case("Gemma2ForCausalLM", _LLAMA | {
        "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24, "num_hidden_layers": 4,
        "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0,
    }),
    "gemma3": Case("Gemma3ForCausalLM", _LLAMA | {
        "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24, "num_hidden_layers": 7,
    }),
    "gemma3, scaled rope": Case("Gemma3ForCausalLM", _LLAMA | {
        "head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2,
        "rope_parameters": {"full_attention": _ROPE | {"rope_type": "linear"},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}},
    }),
    "mixtral": Case("MixtralForCausalLM", _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "bert, masked": Case("BertForMaskedLM", _BERT, "encoder"),
    "bert, pretraining": Case("BertForPreTraining", _BERT, "encoder"),
    "bert, pooled": Case("BertModel", _BERT, "encoder"),
    "bert, classes": Case("BertForSequenceClassification", _BERT | {"num_labels": 3}, "encoder classes"),
    "bert, tokens": Case("BertForTokenClassification", _BERT | {"num_labels": 3}, "encoder"),
    "bert, spans": Case("BertForQuestionAnswering", _BERT, "encoder"),
    "roberta": Case("RobertaForMaskedLM", _BERT | {"pad_token_id": 1, "type_vocab_size": 1}, "encoder"),
    "albert": Case("AlbertForMaskedLM", _BERT | {"embedding_size": 16}, "encoder"),
    "roberta, classes": Case("RobertaForSequenceClassification", _BERT | {
        "pad_token_id": 1, "num_labels": 3}, "encoder classes"),
    "roberta, tokens": Case("RobertaForTokenClassification", _BERT | {"pad_token_id": 1, "num_labels": 3}, "encoder"),
    "albert, pretraining": Case("AlbertForPreTraining", _BERT | {"embedding_size": 16}, "encoder"),
    "albert, pooled": Case("AlbertModel", _BERT | {"embedding_size": 16}, "encoder"),
    "albert, classes": Case("AlbertForSequenceClassification", _BERT | {
        "embedding_size": 16, "num_labels": 3}, "encoder classes"),
    "t5": Case("T5ForConditionalGeneration", _T5, "encoder-decoder"),
    "t5 v1.1": Case(
        "T5ForConditionalGeneration", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "encoder-decoder",
    ),
    "bart": Case("BartForConditionalGeneration", _BART, "encoder-decoder"),
    "resnet, basic": Case("ResNetForImageClassification", _BASIC, "image"),
    "resnet, bottleneck": Case("ResNetForImageClassification", _BOTTLENECK, "image"),
    "resnet, stride first": Case(
        "ResNetForImageClassification", _BOTTLENECK | {"downsample_in_bottleneck": True}, "image"
    ),
    "vit": Case("ViTForImageClassification", _VIT | {"num_labels": 5}, "image"),
    "vit, pooled, no qkv bias": Case("ViTModel", _VIT | {"qkv_bias": False}, "image"),
}  # fmt: skip
