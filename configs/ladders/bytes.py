"""A scaling law of bytes of Webster's dictionary, fitted up to 0.36M parameters, for a run of 1.6M.

    python benchmarks/gcide_text.py runs/gcide.jsonl
    bigmodel scaling plan configs/ladders/bytes.py --workdir runs/ladder
    bigmodel scaling run configs/ladders/bytes.py --workdir runs/ladder --record
    git add results/bytes_prediction.json results/studies/bytes.jsonl && git commit -m "Prediction of the 1.6M run"
    bigmodel scaling run configs/ladders/bytes.py --workdir runs/ladder --record --held-out

Five sizes by four lengths, after approach 3 of Hoffmann et al. 2022 (arXiv:2203.15556), then one run with 4.4 times the
parameters and twice the tokens of the largest. One learning rate for all: widths and depths follow the smallest
by mup (bigmodel_jax/mup.py). The dictionary has 40 MB, so that no run reads any of it twice.

The goal: the prediction, committed before that run, is off by at most 1.5%, its interval at most 4% wide.

Cost, from one rung: 0.24 CPU seconds per thousand parameters and million bytes, and some 15 to start: 1.2 CPU hours for
the 20 rungs and 1.6 for the large run. Neither is finished.
"""

from ml_collections import ConfigDict

LENGTH, ROWS, HEAD = 128, 16, 16
SIZES = {"33k": (2, 32), "67k": (2, 48), "164k": (3, 64), "251k": (3, 80), "357k": (3, 96), "1.6M": (5, 160)}
MILLIONS = (1, 2, 4, 8)


def get_study():
    config = ConfigDict()
    config.batch_size = ROWS
    config.steps = steps(1)
    config.model = dict(
        name="decoder", vocab_size=259, num_layers=2, embed_dim=32, num_heads=2, positions="rotary", norm="rmsnorm",
        norm_bias=False, bias=False, init="fan_in", depth_scaled_init=False, mup_width=32, mup_depth=2,
    )  # fmt: skip
    config.objective = dict(name="causal_lm")
    config.optimizer = dict(name="adamw", lr=8e-3, b2=0.95, clip=1.0)
    config.schedule = dict(name="cosine", warmup=50)
    config.data = dict(
        name="text", corpus="jsonl:runs/gcide.jsonl", tokenizer="bytes", length=LENGTH, validation_fraction=0.02
    )
    config.eval = dict(batch_size=64)
    config.checkpoint = dict(every=500, keep_last=1)
    config.log = dict(every=50, tensorboard=False)
    rungs = [(name, millions) for name in SIZES for millions in MILLIONS if name != "1.6M"] + [("1.6M", 16)]
    return dict(
        name="bytes",
        title="A scaling law of bytes",
        source="Hoffmann et al. 2022 (arXiv:2203.15556), approach 3",
        base=config,
        variants={f"{name}, {millions}M bytes": leaves(name, millions) for name, millions in rungs},
        seeds=(0,),
        metric="validation/bits_per_byte",
        mode="min",
        baseline="33k, 1M bytes",
        held_out=("1.6M, 16M bytes",),
    )  # fmt: skip


def leaves(name, millions):
    return size(*SIZES[name]) | {"steps": steps(millions)}


def size(layers, width):
    return {"model.num_layers": layers, "model.embed_dim": width, "model.num_heads": width // HEAD}


def steps(millions):
    return round(millions * 1e6 / (ROWS * LENGTH))
