"""A small LeNet on scikit-learn's digits, shifted by a pixel and turned by up to ten degrees.

    bigmodel train --config configs/convnet_digits.py --workdir runs/convnet

Held-out accuracy 100% of 360 images (99.7% at step 1000), one seed, 18 s of CPU time. With 16 and 32 features and
a pool behind both convolutions it ended at 96.7% after 900 steps, with twice as many at 98.9% after 1500.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.steps = 1500
    config.batch_size = 64
    config.model = dict(name="convnet", form="lenet_small", dropout=0.2)
    config.objective = dict(name="classification", label_smoothing=0.1)
    config.optimizer = dict(name="adamw", lr=3e-3, weight_decay=0.01)
    config.schedule = dict(name="cosine", warmup=50)
    config.data = dict(name="digits", pad_crop=1, rotate=10.0, mean=(0.305,), std=(0.376,))
    config.eval = dict(every=500, batch_size=120)
    return config
