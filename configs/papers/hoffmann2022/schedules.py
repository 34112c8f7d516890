"""Cosine against warm-up, stable, decay: Hoffmann et al. 2022 (arXiv:2203.15556), Hu et al. 2024 (arXiv:2404.06395).

    bigmodel study run configs/papers/hoffmann2022/schedules.py --workdir runs/schedules --processes 2
    bigmodel study report configs/papers/hoffmann2022/schedules.py --workdir runs/schedules

Hoffmann et al. (appendix B, figure A1) set the length of the cosine to the length of the run, since longer ones end
worse; Hu et al. (section 4) decay in the last tenth alone, which needs no length in advance, and end as well. Here: a
decoder on Python's standard library; the schedules share peak, warm-up and steps. Both papers show curves, so no
number is put beside ours.
"""

from ml_collections import ConfigDict

STEPS, WARMUP = 400, 40


def get_study():
    config = ConfigDict()
    config.steps = STEPS
    config.batch_size = 16
    config.model = dict(
        name="decoder", num_layers=3, embed_dim=96, num_heads=3, mlp_dim=384, max_length=128, positions="rotary",
        bias=False,
    )  # fmt: skip
    config.objective = dict(name="causal_lm")
    config.optimizer = dict(name="adamw", lr=4e-3, b2=0.95, weight_decay=0.1, clip=1.0)
    config.schedule = dict(name="cosine", warmup=WARMUP, final=0.1)
    config.data = dict(
        name="text", corpus="stdlib", tokenizer="bpe", vocab_size=1024, length=128, validation_fraction=0.02
    )
    config.eval = dict(every=100, batch_size=64)
    config.checkpoint = dict(every=0, keep_last=1)
    config.log = dict(every=10, tensorboard=False)
    shapes = {
        "constant": dict(name="constant"),
        "linear": dict(name="linear", final=0.1),
        "stable, then a tenth": dict(name="wsd", decay=0.1, final=0.1),
        "stable, then a fifth": dict(name="wsd", decay=0.2, final=0.1),
        "stable, then 1 - sqrt": dict(name="wsd", decay=0.2, final=0.1, shape="sqrt"),
    }
    return dict(
        name="schedules",
        title="Cosine against warm-up, stable, decay",
        source="Hoffmann et al. 2022 (arXiv:2203.15556), appendix B; Hu et al. 2024 (arXiv:2404.06395), section 4",
        base=config,
        variants={"cosine": {}} | {name: {"schedule": shape | {"warmup": WARMUP}} for name, shape in shapes.items()},
        seeds=(0, 1, 2, 3, 4),
        metric="validation/bits_per_byte",
        mode="min",
        baseline="cosine",
        claims=(
            dict(better="cosine", worse="constant", text="The rate has to come down"),
            dict(
                better="stable, then a fifth", worse="cosine", margin=-0.01,
                text="Stable, then a fifth of linear decay, ends as well as the cosine (within 0.01 bits per byte)",
            ),
            dict(
                better="stable, then a tenth", worse="cosine", margin=-0.01,
                text="A tenth is enough (within 0.01 bits per byte)",
            ),
        ),
        full=full(),
        budget_minutes=50,
    )  # fmt: skip


def full():
    """A 400M decoder on C4 for 20 tokens a parameter, near the 2.4B of Hu et al. in shape."""
    config = ConfigDict()
    config.steps = 16_000
    config.batch_size = 256
    config.model = dict(
        name="decoder", vocab_size=32128, num_layers=24, embed_dim=1024, num_heads=16, mlp_dim=2816, max_length=2048,
        positions="rotary", norm="rmsnorm", norm_bias=False, activation="swiglu", bias=False, dtype="bfloat16",
        remat="minimal",
    )  # fmt: skip
    config.objective = dict(name="causal_lm", chunk=512)
    config.optimizer = dict(name="adamw", lr=1e-3, b2=0.95, weight_decay=0.1, clip=1.0)
    config.schedule = dict(name="wsd", warmup=500, decay=0.1, final=0.1)
    config.data = dict(
        name="text", corpus="tfds:c4/en:train:text", tokenizer="bpe", vocab_size=32000, length=2048,
        validation_fraction=0.0005,
    )  # fmt: skip
    config.mesh = dict(data=1, fsdp=-1)
    config.eval = dict(every=1000, batch_size=256, batches=16)
    config.checkpoint = dict(every=1000)
    return config
