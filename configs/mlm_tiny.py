"""Masked LM with a BERT encoder on the source code of Python's own standard library.

    bigmodel train --config configs/mlm_tiny.py --workdir runs/mlm

15% of the tokens are predicted, 80/10/10; `--config.data.whole_words=True` masks whole words.

1.07 M parameters, 500 steps. Masked accuracy 25.7% (one seed), far from the 42.6% of a count model that
sees both neighbours (benchmarks/text_baselines.py): a minute is too short for a masked LM, which learns
from 15% of its tokens. It is here to be run and changed; configs/mlm_small.py goes 23 points beyond the counts.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.steps = 500
    config.batch_size = 16
    config.model = dict(
        name="encoder", num_layers=4, embed_dim=128, num_heads=2, mlp_dim=512, max_length=128, token_types=0,
        positions="rotary", norm_placement="pre", embed_norm=False, dropout=0.0, attention_dropout=0.0,
        embed_dropout=0.0,
    )  # fmt: skip
    config.objective = dict(name="masked_lm")
    config.optimizer = dict(name="muon", lr=8e-3, clip=1.0)
    config.schedule = dict(name="linear", warmup=20)
    config.data = dict(
        name="masked_text", corpus="stdlib", tokenizer="bpe", vocab_size=2048, length=128,
        validation_fraction=0.05,
    )  # fmt: skip
    config.eval = dict(batch_size=16)
    config.checkpoint = dict(every=250)
    return config
