"""The decoder of the studies on text: three layers of width 96, 400 steps of 2,048 tokens of Python's standard library.

A run takes some 50 CPU seconds. Weights start as T5's: those of layers with a deviation of one over the root of the
fan-in, the stream of embeddings with one of 1. With the usual default, 0.02 whatever the width, the inputs of an
activation start at 0.2 here, where smooth ones are nearly linear, and a comparison of parts measures that.
"""

from ml_collections import ConfigDict

RATES = [2e-3 * 2**n for n in range(8)]
START = 1.6e-2
"""Near the best of these models: variants look for their own from here (bigmodel_jax/study/search.py, walk)."""


def base():
    config = ConfigDict()
    config.steps = 400
    config.batch_size = 16
    config.model = dict(
        name="decoder", num_layers=3, embed_dim=96, num_heads=3, mlp_dim=384, max_length=128, positions="rotary",
        norm="rmsnorm", norm_bias=False, activation="relu", bias=False, init="fan_in", depth_scaled_init=False,
        embed_scale=96**0.5,
    )  # fmt: skip
    config.objective = dict(name="causal_lm")
    config.optimizer = dict(name="adamw", lr=8e-3, b2=0.95, weight_decay=0.1, clip=1.0)
    config.schedule = dict(name="cosine", warmup=40)
    config.data = dict(
        name="text", corpus="stdlib", tokenizer="bpe", vocab_size=1024, length=128, validation_fraction=0.02
    )
    config.eval = dict(every=100, batch_size=64)
    config.checkpoint = dict(every=0, keep_last=1)
    config.log = dict(every=10, tensorboard=False)
    return config


def best_rate():
    """A study's search for the rate of each variant, to a factor of two, on a seed of its own."""
    return dict(
        search=dict(method="walk", leaves={"optimizer.lr": list(RATES)}, start=START), tune_seeds=(100,)
    )  # fmt: skip
