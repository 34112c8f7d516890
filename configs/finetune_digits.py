"""Image transfer: a ResNet trained on the 1,437 8x8 digits of scikit-learn starts one on MNIST-5k, 28x28.

    bigmodel train --config configs/finetune_digits.py:source --workdir runs/digits/source
    bigmodel train --config configs/finetune_digits.py:transfer --workdir runs/digits/transfer \
        --config.init_from.path=runs/digits/source
    bigmodel train --config configs/finetune_digits.py:scratch --workdir runs/digits/scratch
    python benchmarks/finetune.py digits                              all of it, with 50 to 4,000 images

The statistics of batch normalisation start anew; the head is new as well.

Came out, accuracy on 1,000 held-out images after 1,000 steps (results/finetune.json): with 50 images 74.1% transferred
and 74.4% from scratch (paired difference -0.3, -2.4 to 1.7), with 200 94.6 and 94.3 (+0.3, -1.2 to 1.8), with 1,000
97.5 and 97.2 (+0.3, -0.7 to 1.3), with 4,000 98.4 and 98.2 (+0.2, -0.5 to 1.0): the small digits are worth nothing that
shows here once both have learnt. After 300 steps they seemed worth 14 to 17 points: the net from scratch had not.
"""

from ml_collections import ConfigDict

ARGS = ("source", "transfer", "scratch")


def get_config(part: str = "transfer") -> ConfigDict:
    config = ConfigDict()
    config.steps = 600 if part == "source" else 1000  # 300 leave the net from scratch half trained
    config.batch_size = 64
    config.model = {"name": "resnet", "depth": 8, "width": 1.0, "bn_group": 64}
    config.objective = {"name": "classification", "label_smoothing": 0.1}
    config.optimizer = {"name": "nesterov", "lr": 0.1, "beta": 0.9, "weight_decay": 5e-4, "decay": "l2"}
    config.schedule = {"name": "cosine", "warmup": 30}
    augment = {"pad_crop": 1 if part == "source" else 2, "rotate": 10.0}
    config.data = {"name": "digits" if part == "source" else "mnist5k", **augment}
    config.eval = {"batch_size": 64}
    if part == "transfer":
        config.init_from = {"path": "runs/digits/source", "skip": ("^head/",)}
    return config
