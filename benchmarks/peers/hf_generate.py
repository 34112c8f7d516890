"""Hugging Face transformers on CPU: `generate` of a random GPT-2 124M or a small Llama, float32, greedy.

    python -m benchmarks.peers.hf_generate KIND FOLDER        writes the weights that both sides use

As published: scaled_dot_product_attention, its own growing cache, all threads. Needs torch and
transformers, no network.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

CONFIGS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config()),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=1024,
        ),
    ),
}  # fmt: skip


def prompts(batch: int, length: int) -> list[list[int]]:
    """Tokens [batch, length], the same for both sides."""
    return [[(7919 * (row * length + place) + 13) % 10_007 for place in range(length)] for row in range(batch)]


def step_fn(folder: str, batch: int, prompt: int, new: int) -> Callable[[], float]:
    """A closure that generates one token after the prompts and, every other time, `new` of them.

    It returns a number that stands for the tokens.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    tokens = torch.tensor(prompts(batch, prompt))
    mask = torch.ones_like(tokens)
    sizes = itertools.cycle((1, new))

    def step() -> float:
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=next(sizes))
        found = out[:, prompt:].double()
        return float((found * torch.arange(1, found.shape[1] + 1)).sum())

    return step


if __name__ == "__main__":
    torch.manual_seed(0)
    cls, config = CONFIGS[sys.argv[1]]
    cls(config).save_pretrained(sys.argv[2])
