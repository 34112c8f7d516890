"""Positions and length extrapolation: Press et al. 2022 (arXiv:2108.12409), section 2.2 and 4, figures 1 and 4.

    bigmodel study run configs/papers/press2022/positions.py --workdir runs/positions --processes 2
    bigmodel study report configs/papers/press2022/positions.py --workdir runs/positions

Trained on rows of 64 tokens. The metric is what the same held-out text costs more in rows of 256 than in rows of 64,
in bits per byte: a model that uses the longer context is below 0, and how good it is on short rows cancels. The paper
trains 16 layers on WikiText-103 with rows of 512 and evaluates up to 15,360 tokens; its T5 bias is left out, since
decoders here have none. Learned positions have a table of 256 rows, of which training reaches 64: the paper says that
they cannot extrapolate at all and does not plot them.

Initial weights are by fan-in and embeddings of size 1. With weights and embeddings of 0.02, five runs with sinusoids
(whose size is 0.7) learnt no more than how frequent tokens are (3.355 bits per byte on rows of 64 and of 256 alike);
they are not counted.

Came out, 5 seeds (results/studies/positions): longer rows cost 0.154 bits per byte with sinusoids, 0.100 with rotary
positions, 0.043 with a learned table and -0.015 with ALiBi, which alone gains from the longer context; all three
claims are supported. On rows of 64 the four have 1.949, 1.812, 1.949 and 1.869, on rows of 256 2.103, 1.911, 1.992 and
1.854. That the table's untrained rows cost so little is not in the paper: they start small beside embeddings of 1, so
that later tokens have next to no position. One rate for all four; 21 CPU minutes.

The numbers of the paper are perplexities on another text; those at four times the training length are in figures
only, so nothing is put beside ours.
"""

from ml_collections import ConfigDict

SHORT, LONG = 64, 256


def get_study():
    config = ConfigDict()
    config.steps = 400
    config.batch_size = 32
    config.model = dict(
        name="decoder", num_layers=3, embed_dim=96, num_heads=4, max_length=LONG, positions="sinusoidal",
        tied_embeddings=True, init="fan_in", embed_scale=96**0.5,
    )  # fmt: skip
    config.objective = dict(name="causal_lm")
    config.optimizer = dict(name="adamw", lr=4e-3, b2=0.95, weight_decay=0.1, clip=1.0)
    config.schedule = dict(name="cosine", warmup=40)
    config.data = dict(
        name="text", corpus="stdlib", tokenizer="bpe", vocab_size=1024, length=SHORT, validation_fraction=0.02,
        eval_lengths=(LONG,),
    )  # fmt: skip
    config.eval = dict(every=100, batch_size=32)
    config.checkpoint = dict(every=0, keep_last=1)
    config.log = dict(every=10, tensorboard=False)
    long = f"rows of {LONG} tokens after training on {SHORT}"
    return dict(
        name="positions",
        title=f"Positions: {long}",
        source="Press et al. 2022 (arXiv:2108.12409), sections 2.2 and 4, figures 1 and 4",
        base=config,
        variants={name: {"model.positions": name} for name in ("sinusoidal", "learned", "rotary", "alibi")},
        seeds=(0, 1, 2, 3, 4),
        metric=f"validation_{LONG}/bits_per_byte - validation/bits_per_byte",
        mode="min",
        baseline="sinusoidal",
        claims=(
            dict(better="alibi", worse="sinusoidal", text=f"ALiBi extrapolates better than sinusoids: {long}"),
            dict(better="alibi", worse="rotary", text=f"ALiBi extrapolates better than rotary positions: {long}"),
            dict(better="rotary", worse="sinusoidal", text=f"Rotary extrapolates better than sinusoids: {long}"),
        ),
        full={positions: full(positions) for positions in ("alibi", "sinusoidal", "rotary")},
        budget_minutes=40,
    )  # fmt: skip


def full(positions):
    """16 layers of width 1024 and 8 heads (Baevski & Auli 2019) on rows of 512. Wiki40B in place of WikiText-103, which
    TFDS does not have, and one table in place of adaptive embeddings."""
    config = ConfigDict()
    config.steps = 184_000
    config.batch_size = 128
    config.model = dict(
        name="decoder", vocab_size=32000, num_layers=16, embed_dim=1024, num_heads=8, mlp_dim=4096, max_length=2048,
        positions=positions, activation="relu", dropout=0.3, dtype="bfloat16",
    )  # fmt: skip
    config.objective = dict(name="causal_lm", chunk=128)
    config.optimizer = dict(name="nesterov", lr=1.0, beta=0.99, clip=0.1)
    config.schedule = dict(name="cosine", warmup=16_000)
    config.data = dict(
        name="text", corpus="tfds:wiki40b/en:train:text", tokenizer="bpe", vocab_size=32000, length=512,
        eval_lengths=(1024, 2048), validation_fraction=0.001,
    )  # fmt: skip
    config.eval = dict(every=2000, batch_size=128, batches=64)
    config.checkpoint = dict(every=2000)
    return config
