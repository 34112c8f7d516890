"""Hugging Face transformers on CPU: GPT2LMHeadModel and BertForMaskedLM from a config, random weights.

Same optimizer as the minimal torch GPT (fused AdamW), scaled_dot_product_attention, no dropout, so
that every contestant computes the same thing. Needs torch and transformers, no network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from benchmarks.peers.torch_gpt import adamw


def _gpt2(layers: int, dim: int, heads: int, vocab: int, length: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab, n_positions=length, n_embd=dim, n_layer=layers, n_head=heads,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa",
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def _bert(layers: int, dim: int, heads: int, vocab: int, length: int) -> BertForMaskedLM:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=vocab, max_position_embeddings=length, hidden_size=dim, num_hidden_layers=layers,
            num_attention_heads=heads, intermediate_size=4 * dim, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, attn_implementation="sdpa",
        )
    )  # fmt: skip


def step_fn(
    kind: str, layers: int, dim: int, heads: int, vocab: int, length: int, batch: int, masked: int = 0
) -> Callable[[], float]:
    """A closure that runs one training step on fixed random tokens and returns the loss.

    Args:
      kind: "gpt2" predicts the next token everywhere, "bert" `masked` random positions of each row.
    """
    torch.manual_seed(0)
    model = (_gpt2 if kind == "gpt2" else _bert)(layers, dim, heads, vocab, length).train()
    tokens = torch.randint(vocab, (batch, length))
    labels = tokens.clone()
    if kind == "bert":
        hidden = torch.rand(batch, length).argsort(1)[:, masked:]
        labels.scatter_(1, hidden, -100)
    optimizer = adamw(model)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
