"""Masked LM with a BERT encoder on the source code of Python's own standard library.

    bigmodel train --config configs/mlm_tiny.py --workdir runs/mlm
"""

from ml_collections import ConfigDict


def get_config(arg=None):
    config = ConfigDict()
    config.steps = 300
    config.batch_size = 16
    config.model = dict(
        name="encoder", num_layers=4, embed_dim=256, num_heads=4, max_length=128, dropout=0.0,
        attention_dropout=0.0, embed_dropout=0.0, norm_placement="pre",
    )  # fmt: skip
    config.objective = dict(name="masked_lm")
    config.optimizer = dict(name="adamw", lr=1e-3, weight_decay=0.01, clip=1.0)
    config.schedule = dict(name="linear", warmup=30)
    config.data = dict(
        name="masked_text", corpus="stdlib", tokenizer="bpe", vocab_size=2048, length=128, mode="stream"
    )
    config.eval = dict(batch_size=16)
    config.checkpoint = dict(every=100)
    return config
