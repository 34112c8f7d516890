"""Denoising with a T5-style encoder-decoder on the source code of Python's own standard library.

    bigmodel train --config configs/span_tiny.py --workdir runs/span

15% of the tokens in runs of three on average (Raffel et al. 2020): rows of 128 tokens become 116 of source
and 26 of target, without padding. 1.34 M parameters; a minute and a half on one core, to a held-out loss of 4.95 nats
(27.2% of the hidden tokens right, of 2,048).
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.steps = 400
    config.batch_size = 16
    config.model = dict(
        name="encoder_decoder", num_layers=2, decoder_layers=2, embed_dim=128, num_heads=2, mlp_dim=256,
        positions="none", relative_buckets=32, attention_scale=1.0, norm="rmsnorm", norm_bias=False,
        norm_placement="pre", bias=False, activation="geglu", embed_scale=1.0, tied_embeddings=False,
        dropout=0.0, embed_dropout=0.0,
    )  # fmt: skip
    config.objective = dict(name="seq2seq")
    config.optimizer = dict(name="muon", lr=8e-3, clip=1.0)
    config.schedule = dict(name="linear", warmup=20)
    config.data = dict(
        name="span_text", corpus="stdlib", tokenizer="bpe", vocab_size=2048, length=128, validation_fraction=0.05
    )
    config.eval = dict(batch_size=16)
    config.checkpoint = dict(every=200)
    return config
