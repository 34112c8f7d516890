"""Optimizers at tuned learning rates: Adam, SGD, momentum, Adafactor, Lion, Muon on one language model.

    bigmodel study run configs/papers/optimizers/tuned.py --workdir runs/optimizers --processes 2
    bigmodel study report configs/papers/optimizers/tuned.py --workdir runs/optimizers

One grid of rates for all, half a decade apart, wide enough for the smallest (Lion) and the largest (SGD); each is
tuned on a seed of its own and then run on five others. Nothing but the rate is tuned: betas are each paper's own,
and there is no weight decay. The report flags a best rate at the edge of the grid.

Sources: Kingma & Ba 2015 (Adam), Shazeer & Stern 2018 (Adafactor), Chen et al. 2023 (Lion), Jordan et al. 2024 and
Liu et al. 2025 (Muon). Their claims are on other tasks and scales (Lion: "on par or better than" AdamW; Muon: about
twice as fast as AdamW), so there is no published number beside these.
"""

from ml_collections import ConfigDict

from configs import gpt2

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
OPTIMIZERS = ("adam", "sgd", "momentum", "adafactor", "lion", "muon")


def get_study():
    config = ConfigDict()
    config.steps = 250
    config.batch_size = 16
    config.model = dict(
        name="decoder", num_layers=2, embed_dim=96, num_heads=3, max_length=128, positions="rotary", norm="rmsnorm",
        norm_bias=False, bias=False, mlp_dim=256, activation="swiglu",
    )  # fmt: skip
    config.objective = dict(name="causal_lm")
    config.optimizer = dict(name="adam", lr=3e-3, clip=1.0)
    config.schedule = dict(name="cosine", warmup=25)
    config.data = dict(
        name="text", corpus="stdlib", tokenizer="bpe", vocab_size=1024, length=128, validation_fraction=0.02
    )
    config.eval = dict(every=50, batch_size=64)
    config.checkpoint = dict(every=0, keep_last=1)
    config.guard = dict(limit=20)
    config.log = dict(every=10, tensorboard=False)
    full = gpt2.get_config("124m")
    full.optimizer = dict(name="muon", lr=6e-4, weight_decay=0.1, clip=1.0)
    return dict(
        name="optimizers",
        title="Optimizers, each at its tuned learning rate",
        source="Kingma & Ba 2015; Shazeer & Stern 2018; Chen et al. 2023; Jordan et al. 2024",
        base=config,
        variants={name: {"optimizer": dict(name=name, lr=3e-3, clip=1.0)} for name in OPTIMIZERS},
        tune={"optimizer.lr": RATES},
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
        budget_minutes=60,
    )  # fmt: skip
