"""QK-norm and z-loss at high learning rates: Wortsman et al. 2023 (arXiv:2309.14322), section 3.1, figures 1 to 3.

    bigmodel study run configs/papers/wortsman2023/stability.py --workdir runs/stability --processes 2
    bigmodel study report configs/papers/wortsman2023/stability.py --workdir runs/stability

The paper sweeps the learning rate of decoders from 2.4M to 1.2B parameters on C4 and finds two instabilities at the
high end: attention logits that grow, which QK-norm stops, and output logits that drift, which z-loss stops. Here: one
decoder of four layers on Python's standard library, untied, at a rate where it trains best and at rates four and
sixteen times that. Runs that diverge count as worse than all that do not. The paper's numbers are curves, so none is
put beside ours.

Came out (results/studies/stability/report.md; five seeds of what the claims compare, two of the rest): at sixteen times
the best rate QK-norm is 0.93 bits per byte ahead, and at the best one 0.03 (both supported); z-loss makes no difference
that shows, alone or beside it (undecided). The claims were written before the runs.
"""

from ml_collections import ConfigDict

from configs.papers import small_decoder

RATES = LOW, MIDDLE, HIGH = 1.6e-2, 6.4e-2, 2.56e-1


def get_study():
    config = small_decoder.base()
    config.model.update(num_layers=4, tied_embeddings=False)
    config.guard = dict(limit=20)
    parts = {
        "plain": {}, "qk-norm": {"model.qk_norm": True}, "z-loss": {"objective.z_loss": 1e-4},
        "both": {"model.qk_norm": True, "objective.z_loss": 1e-4},
    }  # fmt: skip
    # Decay apart from the rate, as in the paper: 1e-4 a step at the peak.
    rates = {rate: {"optimizer.lr": rate, "optimizer.weight_decay": 1e-4 / rate} for rate in RATES}
    return dict(
        name="stability",
        title="QK-norm and z-loss at high learning rates",
        source="Wortsman et al. 2023 (arXiv:2309.14322), section 3.1, figures 1 to 3",
        base=config,
        variants={
            f"{name}, {rate:g}": leaves | rates[rate] for name, leaves in parts.items() for rate in RATES
        },
        seeds=(0, 1, 2, 3, 4),
        metric="validation/bits_per_byte",
        mode="min",
        baseline=f"plain, {LOW:g}",
        claims=(
            dict(better=f"qk-norm, {HIGH:g}", worse=f"plain, {HIGH:g}", text="QK-norm helps at a high rate"),
            dict(better=f"z-loss, {HIGH:g}", worse=f"plain, {HIGH:g}", text="Z-loss helps at a high rate"),
            dict(
                better=f"both, {HIGH:g}", worse=f"qk-norm, {HIGH:g}", text="Z-loss adds to QK-norm at a high rate"
            ),
            dict(
                better=f"qk-norm, {LOW:g}", worse=f"plain, {LOW:g}", margin=-0.02,
                text="At the best rate QK-norm costs nothing (within 0.02 bits per byte)",
            ),
        ),
        full={"plain": full(qk_norm=False), "both": full(qk_norm=True)},
        budget_minutes=90,
    )  # fmt: skip


def full(qk_norm):
    """The 1.2B model of the paper: 24 layers of width 2048, 131,072 tokens a batch for 100,000 steps, C4."""
    config = ConfigDict()
    config.steps = 100_000
    config.batch_size = 256
    config.model = dict(
        name="decoder", vocab_size=32128, num_layers=24, embed_dim=2048, num_heads=32, mlp_dim=8192, max_length=512,
        positions="rotary", bias=False, qk_norm=qk_norm, tied_embeddings=False, dtype="bfloat16", remat="minimal",
    )  # fmt: skip
    config.objective = dict(name="causal_lm", chunk=128, z_loss=1e-4 if qk_norm else 0.0)
    config.optimizer = dict(name="adamw", lr=1e-2, b2=0.95, weight_decay=1e-4, clip=1.0)
    config.schedule = dict(name="cosine", warmup=5000)
    config.data = dict(
        name="text", corpus="tfds:c4/en:train:text", tokenizer="bpe", vocab_size=32000, length=512,
        validation_fraction=0.0005,
    )  # fmt: skip
    config.mesh = dict(data=1, fsdp=-1)
    config.eval = dict(every=5000, batch_size=256, batches=64)
    config.checkpoint = dict(every=1000)
    return config
