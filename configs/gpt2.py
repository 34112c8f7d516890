"""GPT-2 (Radford et al. 2019) at 124M, 350M and 1.5B parameters on C4.

    bigmodel train --config configs/gpt2.py:124m --workdir runs/gpt2

Shapes are those of the paper; learning rates, batch sizes in tokens and the AdamW settings are
those of GPT-3 (Brown et al. 2020, table 2.1) for the model of that size. The token budget of 10 B
is what the open reproductions of the 124M model use.

Needs the TFDS data set c4/en on disk (305 GB download; `tfds build c4/en`). Compiled, not trained,
by this project: see results/lowered.json.
"""

from ml_collections import ConfigDict

# layers, width, heads, peak lr, tokens per step
SIZES = {
    "124m": (12, 768, 12, 6e-4, 2**19),
    "350m": (24, 1024, 16, 3e-4, 2**19),
    "1.5b": (48, 1600, 25, 2e-4, 2**20),
}
ARGS = tuple(SIZES)


def get_config(arg="124m"):
    layers, width, heads, lr, tokens = SIZES[arg]
    config = ConfigDict()
    config.batch_size = tokens // 1024
    config.microbatch = 64
    config.steps = 10_000_000_000 // tokens
    config.model = dict(
        name="decoder", vocab_size=50257, num_layers=layers, embed_dim=width, num_heads=heads,
        max_length=1024, dtype="bfloat16", remat="full",
    )  # fmt: skip
    config.objective = dict(name="causal_lm", chunk=128)
    config.optimizer = dict(name="adamw", lr=lr, b2=0.95, weight_decay=0.1, clip=1.0)
    config.schedule = dict(name="cosine", warmup=700, final=0.1)
    config.data = dict(
        name="text", corpus="tfds:c4/en:train:text", tokenizer="bpe", vocab_size=50257, length=1024,
        validation_fraction=0.0005,
    )  # fmt: skip
    config.eval = dict(every=1000, batch_size=64, batches=160)
    config.checkpoint = dict(every=1000, keep_every=5000)
    config.runtime = dict(watchdog_s=1800.0)
    return config
