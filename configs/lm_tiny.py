"""Causal LM on the source code of Python's own standard library: the first run on any machine.

    bigmodel train --config configs/lm_tiny.py --workdir runs/first
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    config = ConfigDict()
    config.steps = 500
    config.batch_size = 8
    config.model = dict(
        name="decoder", num_layers=4, embed_dim=128, num_heads=2, max_length=128, positions="rotary",
        norm="rmsnorm", norm_bias=False, activation="swiglu", mlp_dim=352, bias=False,
    )  # fmt: skip
    config.objective = dict(name="causal_lm")
    config.optimizer = dict(name="muon", lr=8e-3, clip=1.0)
    config.schedule = dict(name="linear", warmup=15)
    config.data = dict(
        name="text", corpus="stdlib", tokenizer="bpe", vocab_size=2048, length=128, validation_fraction=0.05
    )
    config.eval = dict(batch_size=16)
    config.checkpoint = dict(every=250)
    config.sample = dict(prompt="def ", length=100)
    return config
