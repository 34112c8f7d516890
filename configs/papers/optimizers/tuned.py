"""Optimizers at tuned learning rates: Adam, SGD, momentum, Adafactor, Lion, Muon on one language model.

    bigmodel study run configs/papers/optimizers/tuned.py --workdir runs/optimizers --processes 2
    bigmodel study report configs/papers/optimizers/tuned.py --workdir runs/optimizers

Each walks along one grid of rates, a factor of two apart, to its best on a seed of its own, and then runs on five
others. Nothing but the rate is tuned: betas are each paper's own, and there is no weight decay. The report flags a best
rate at the edge of the grid.

Sources: Kingma & Ba 2015 (Adam), Shazeer & Stern 2018 (Adafactor), Chen et al. 2023 (Lion), Jordan et al. 2024 and
Liu et al. 2025 (Muon). Their claims are on other tasks and scales (Lion: "on par or better than" AdamW; Muon: about
twice as fast as AdamW), so there is no published number beside these.
"""

from configs import gpt2
from configs.papers import small_decoder

RATES = [2.0**n for n in range(-14, 5)]
OPTIMIZERS = ("adam", "sgd", "momentum", "adafactor", "lion", "muon")


def get_study():
    config = small_decoder.base()
    config.optimizer = dict(name="adam", lr=2.0**-6, clip=1.0)
    config.guard = dict(limit=20)
    full = gpt2.get_config("124m")
    full.optimizer = dict(name="muon", lr=6e-4, weight_decay=0.1, clip=1.0)
    return dict(
        name="optimizers",
        title="Optimizers, each at its tuned learning rate",
        source="Kingma & Ba 2015; Shazeer & Stern 2018; Chen et al. 2023; Jordan et al. 2024",
        base=config,
        variants={name: {"optimizer": dict(name=name, lr=2.0**-6, clip=1.0)} for name in OPTIMIZERS},
        search=dict(method="walk", leaves={"optimizer.lr": RATES}, start=2.0**-6),
        tune_seeds=(100,),
        seeds=(0, 1, 2, 3, 4),
        metric="validation/bits_per_byte",
        mode="min",
        baseline="adam",
        claims=(
            dict(better="adam", worse="sgd", text="Adam is better than SGD on a Transformer"),
            dict(better="momentum", worse="sgd", text="Momentum helps SGD"),
            dict(better="adam", worse="momentum", text="Adam is better than SGD with momentum"),
            dict(better="muon", worse="adam", text="Muon is better than Adam"),
            dict(
                better="lion", worse="adam", margin=-0.02, text="Lion is on par with Adam (within 0.02 bits per byte)"
            ),
            dict(
                better="adafactor", worse="adam", margin=-0.02,
                text="Adafactor is on par with Adam (within 0.02 bits per byte)",
            ),
        ),
        full=full,
        budget_minutes=90,
    )  # fmt: skip
