"""BERT base and large (Devlin et al. 2019), masked LM on Wikipedia, without next-sentence prediction.

    bigmodel train --config configs/bert.py:base --workdir runs/bert

Batch, steps, learning rate, decay and warm-up are the paper's (appendix A.2); next-sentence
prediction is left out as in RoBERTa (Liu et al. 2019), and masks are drawn anew in every epoch.

Needs the TFDS data set wikipedia/20230601.en on disk. Compiled, not trained, by this project: see
results/lowered.json.
"""

from ml_collections import ConfigDict

SIZES = {"base": (12, 768, 12), "large": (24, 1024, 16)}
ARGS = tuple(SIZES)


def get_config(arg="base"):
    layers, width, heads = SIZES[arg]
    config = ConfigDict()
    config.batch_size = 256
    config.steps = 1_000_000
    config.model = dict(
        name="encoder", vocab_size=30522, num_layers=layers, embed_dim=width, num_heads=heads,
        max_length=512, dtype="bfloat16",
    )  # fmt: skip
    config.objective = dict(name="masked_lm")
    config.optimizer = dict(name="adamw", lr=1e-4, b2=0.999, eps=1e-6, weight_decay=0.01, clip=1.0)
    config.schedule = dict(name="linear", warmup=10_000)
    config.data = dict(
        name="masked_text", corpus="tfds:wikipedia/20230601.en:train:text", tokenizer="unigram",
        vocab_size=30522, length=512, mode="pack", validation_fraction=0.005,
    )  # fmt: skip
    config.eval = dict(every=10_000, batch_size=256, batches=40)
    config.checkpoint = dict(every=5000, keep_every=100_000)
    config.runtime = dict(watchdog_s=1800.0)
    return config
