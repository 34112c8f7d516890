"""Llama-style decoders at 1B, 8B and 70B parameters on C4.

    bigmodel train --config configs/llama.py:8b --workdir runs/llama-8b

Shapes and the rotary base are those of Llama 3.2 1B, Llama 3 8B and 70B (Grattafiori et al. 2024,
table 3). Peak learning rates of 8B and 70B, cosine decay and AdamW settings are from the same
paper; the 1B rate follows the 8B one. The token budget here is 20 tokens a parameter (Hoffmann et
al. 2022), not the paper's 15 T.

Needs the TFDS data set c4/en on disk. Compiled, not trained, by this project: see
results/lowered.json.
"""

from ml_collections import ConfigDict

# layers, width, heads, kv heads, ffn, peak lr, parameters, tied
SIZES = {
    "1b": (16, 2048, 32, 8, 8192, 3e-4, 1.24e9, True),
    "8b": (32, 4096, 32, 8, 14336, 3e-4, 8.03e9, False),
    "70b": (80, 8192, 64, 8, 28672, 1.5e-4, 70.6e9, False),
}
ARGS = tuple(SIZES)
LENGTH = 8192
TOKENS = 2**22


def get_config(arg="8b"):
    layers, width, heads, kv_heads, mlp, lr, parameters, tied = SIZES[arg]
    config = ConfigDict()
    config.batch_size = TOKENS // LENGTH
    config.steps = int(20 * parameters) // TOKENS
    config.model = dict(
        name="decoder", vocab_size=128256, num_layers=layers, embed_dim=width, num_heads=heads,
        num_kv_heads=kv_heads, mlp_dim=mlp, max_length=LENGTH, positions="rotary", rope_theta=500_000.0,
        norm="rmsnorm", norm_bias=False, activation="swiglu", bias=False, tied_embeddings=tied, dtype="bfloat16",
        remat="full",
    )  # fmt: skip
    config.objective = dict(name="causal_lm", chunk=1024)
    config.optimizer = dict(name="adamw", lr=lr, b2=0.95, weight_decay=0.1, clip=1.0)
    config.schedule = dict(name="cosine", warmup=2000, final=0.1)
    config.data = dict(
        name="text", corpus="tfds:c4/en:train:text", tokenizer="bpe", vocab_size=128256, length=LENGTH,
        validation_fraction=0.0005,
    )  # fmt: skip
    config.mesh = dict(fsdp=-1, data=1)
    config.eval = dict(every=1000, batch_size=512, batches=4)
    config.checkpoint = dict(every=500, keep_every=5000)
    config.runtime = dict(watchdog_s=1800.0)
    return config
