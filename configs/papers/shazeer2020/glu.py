"""Gated feed-forward layers: Shazeer 2020 (arXiv:2002.05202), table 1.

    bigmodel study run configs/papers/shazeer2020/glu.py --workdir runs/glu --processes 2
    bigmodel study report configs/papers/shazeer2020/glu.py --workdir runs/glu

The paper trains T5-base on span-filling of C4 with Adafactor; gated layers have two thirds of the width, so that
parameters and arithmetic are the same. Here: a causal decoder on Python's standard library with AdamW, the same two
thirds. The paper's spread over four runs of its baseline is 0.005 (65,536 steps), its largest gain 0.055: expect to
need what `seeds needed` says rather than a verdict from five seeds on every pair.

Weights start as T5's: those of layers with a deviation of one over the root of the fan-in, the stream of embeddings
with one of 1. With the usual default, 0.02 whatever the width, the inputs of an activation start at 0.2 here, where
GELU and Swish are nearly linear: ReLU (1.893 bits per byte, five seeds, at 2e-3) was then 0.06 and 0.10 ahead of
them. Those runs and a second beginning, with layers by fan-in and embeddings left at 0.10 (ReLU 1.98 at the best of
four rates), were given up before a table was made. Each variant has its best rate, to a factor of two, found on a
seed of its own.

Came out (results/studies/glu/report.md): the paper's gains do not show in 400 steps. GELU (1.744) leads and Swish is
1.760, ReLU 1.769; gating makes GELU worse by 0.033 and Swish by 0.019, the bilinear layer is 0.025 behind ReLU (all
three contradicted); GEGLU and SwiGLU against ReLU are undecided, some 20 to 25 seeds from a verdict. All eight are best
at the same rate, 1.6e-2. Gated layers have fewer features (256 for 384), and may need longer to pay for it.
"""

from ml_collections import ConfigDict

from configs.papers import small_decoder

WIDTH = 384  # of the plain layers; two thirds of it for gated ones
GATED = ("glu", "bilinear", "geglu", "swiglu", "reglu")


def get_study():
    variants = {name: {"model.activation": name} for name in ("relu", "gelu", "swish")}
    variants |= {name: {"model.activation": name, "model.mlp_dim": WIDTH * 2 // 3} for name in GATED}
    return dict(
        name="glu",
        title="Gated feed-forward layers",
        source="Shazeer 2020 (arXiv:2002.05202), table 1",
        base=small_decoder.base(),
        variants=variants,
        seeds=(0, 1, 2, 3, 4),
        metric="validation/bits_per_byte",
        mode="min",
        baseline="relu",
        claims=(
            dict(better="geglu", worse="relu", text="GEGLU is better than ReLU"),
            dict(better="swiglu", worse="relu", text="SwiGLU is better than ReLU"),
            dict(better="geglu", worse="gelu", text="Gating helps GELU"),
            dict(better="swiglu", worse="swish", text="Gating helps Swish"),
            dict(better="bilinear", worse="relu", text="Even the bilinear layer is better than ReLU"),
        ),
        published={
            "relu": 1.997, "gelu": 1.983, "swish": 1.994, "glu": 1.982, "bilinear": 1.960, "geglu": 1.942,
            "swiglu": 1.944, "reglu": 1.953,
        },
        published_metric="held-out log-perplexity of span-filling on C4 after 65,536 steps",
        published_source="Shazeer 2020, table 1",
        full={"geglu": full("geglu", 2048), "relu": full("relu", 3072)},
        budget_minutes=90,
        **small_decoder.best_rate(),
    )  # fmt: skip


def full(activation, mlp_dim):
    """T5-base on span-filling of C4: 65,536 steps of 128 rows of 512 tokens, Adafactor, no dropout."""
    config = ConfigDict()
    config.steps = 65_536
    config.batch_size = 128
    config.model = dict(
        name="encoder_decoder", vocab_size=32128, num_layers=12, embed_dim=768, num_heads=12, mlp_dim=mlp_dim,
        max_length=1024, positions="none", relative_buckets=32, attention_scale=1.0, norm="rmsnorm", norm_bias=False,
        norm_placement="pre", bias=False, activation=activation, embed_scale=1.0, head_scale=768**-0.5, dropout=0.0,
        embed_dropout=0.0, dtype="bfloat16",
    )  # fmt: skip
    config.objective = dict(name="seq2seq")
    config.optimizer = dict(name="adafactor", lr=1.0)
    config.schedule = dict(name="rsqrt", warmup=0, timescale=10_000)
    config.data = dict(
        name="span_text", corpus="tfds:c4/en:train:text", tokenizer="unigram", vocab_size=32000, length=512,
        validation_fraction=0.0005,
    )  # fmt: skip
    config.eval = dict(every=4096, batch_size=128, batches=64)
    config.checkpoint = dict(every=4096)
    return config
