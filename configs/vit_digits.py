"""A small Vision Transformer on scikit-learn's digits: 16 patches of 2x2 pixels.

    bigmodel train --config configs/vit_digits.py --workdir runs/vit

Held-out accuracy 98.33% of 360 images, one seed, 51 s of CPU time (103,000 parameters). AdamW (lr 2e-3, dropout 0.1)
ended at 91.4% after as many steps. On so few tokens the plain attention is faster than the one in blocks.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.steps = 1500
    config.batch_size = 64
    config.model = dict(
        name="vit", patch_size=2, num_layers=3, embed_dim=64, num_heads=2, mlp_dim=128, pooling="mean",
        attention="reference",
    )  # fmt: skip
    config.objective = dict(name="classification", label_smoothing=0.1)
    config.optimizer = dict(name="muon", lr=5e-3, weight_decay=0.05, clip=1.0)
    config.schedule = dict(name="cosine", warmup=100)
    config.data = dict(name="digits", pad_crop=1, rotate=10.0, mean=(0.305,), std=(0.376,))
    config.eval = dict(every=500, batch_size=120)
    return config
