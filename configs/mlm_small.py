"""Masked LM on Python's standard library, for about an hour on two cores.

    bigmodel train --config configs/mlm_small.py --workdir runs/mlm-small
    python benchmarks/text_baselines.py runs/mlm-small

The aim is a masked accuracy 10 points above a count model of the left and right neighbour. 30% of the tokens are
masked, which small models learn from faster than from 15% (Wettig et al. 2023, "Should you mask 15%?"); the count
model is judged on the same masks. Not run to its end yet.
"""

from configs import mlm_tiny


def get_config(arg=None):
    config = mlm_tiny.get_config()
    config.steps = 2500
    config.batch_size = 32
    config.model.update(num_layers=6, embed_dim=256, num_heads=4, mlp_dim=1024)
    config.optimizer.update(lr=5e-3)
    config.schedule = dict(name="linear", warmup=100)
    config.data.update(rate=0.3)
    config.eval = dict(every=500, batch_size=32)
    return config
