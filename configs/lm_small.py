"""Causal LM on Python's standard library, for an hour or two on two cores.

    bigmodel train --config configs/lm_small.py --workdir runs/small
    python benchmarks/text_baselines.py runs/small

The aim is at most 1.40 held-out bits per byte; the mark to beat is xz -9e primed with the training
text. Not run to its end yet.
"""

from configs import lm_tiny


def get_config(arg=None):
    config = lm_tiny.get_config()
    config.steps = 4000
    config.batch_size = 16
    config.model.update(num_layers=6, embed_dim=256, num_heads=4, mlp_dim=704, max_length=256)
    config.optimizer.update(lr=5e-3)
    config.schedule = dict(name="linear", warmup=100)
    config.data.update(vocab_size=4096, length=256)
    config.eval = dict(every=1000, batch_size=16)
    config.checkpoint = dict(every=250)
    return config
