"""Mixtral 8x7B on C4: a mixture of 8 experts of which each token uses 2 (Jiang et al. 2024).

    bigmodel plan --config configs/mixtral.py --target v5p:8x8x8

Shapes and the rotary base are the paper's (table 1) and those of the released model; 46.7 B parameters, 12.9 B of them
active for a token. No token is dropped, as in the release. Learning rate, schedule and balance loss are not published:
they are those of llama.py's 8B and the coefficient of Switch (Fedus et al. 2022). The budget is 20 tokens per active
parameter.

Compiled, not trained, by this project: see results/plans.md.
"""

from ml_collections import ConfigDict

LENGTH = 8192
TOKENS = 2**22


def get_config(arg=None):
    config = ConfigDict()
    config.batch_size = TOKENS // LENGTH
    config.steps = int(20 * 12.9e9) // TOKENS
    config.model = dict(
        name="decoder", vocab_size=32000, num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=8, mlp_dim=14336,
        max_length=LENGTH, positions="rotary", rope_theta=1_000_000.0, norm="rmsnorm", norm_bias=False,
        activation="swiglu", bias=False, tied_embeddings=False, num_experts=8, experts_per_token=2, dtype="bfloat16",
        remat="full",
    )  # fmt: skip
    config.objective = dict(name="causal_lm", chunk=1024, balance_loss=0.01)
    config.optimizer = dict(name="adamw", lr=3e-4, b2=0.95, weight_decay=0.1, clip=1.0)
    config.schedule = dict(name="cosine", warmup=2000, final=0.1)
    config.data = dict(
        name="text", corpus="tfds:c4/en:train:text", tokenizer="bpe", vocab_size=32000, length=LENGTH,
        validation_fraction=0.0005,
    )  # fmt: skip
    config.mesh = dict(fsdp=-1, data=1)
    config.eval = dict(every=1000, batch_size=512, batches=4)
    config.checkpoint = dict(every=500, keep_every=5000)
    config.runtime = dict(watchdog_s=1800.0)
    return config
