"""Causal LM on the source code of Python's own standard library: the first run on any machine.

    bigmodel train --config configs/lm_tiny.py --workdir runs/first
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    config = ConfigDict()
    config.steps = 300
    config.batch_size = 8
    config.model = dict(
        name="decoder", num_layers=4, embed_dim=256, num_heads=4, max_length=256,
        positions="rotary", norm="rmsnorm", norm_bias=False, activation="swiglu", mlp_dim=704, bias=False,
    )  # fmt: skip
    config.objective = dict(name="causal_lm")
    config.optimizer = dict(name="muon", lr=0.02, weight_decay=0.0, clip=1.0)
    config.schedule = dict(name="wsd", warmup=20)
    config.data = dict(name="text", corpus="stdlib", tokenizer="bpe", vocab_size=2048, length=256)
    config.eval = dict(batch_size=16)
    config.checkpoint = dict(every=100)
    config.sample = dict(prompt="def ", length=120)
    return config
