"""Grapheme to phoneme: an encoder-decoder reads the letters of a word and writes its phonemes.

    bigmodel train --config configs/g2p_cmudict.py --workdir runs/g2p
    python benchmarks/g2p.py runs/g2p

126,000 words of the CMU dictionary; 5% of them, with all their pronunciations, are held out. 39 phonemes,
`--config.data.stress=True` keeps the stress of vowels (the benchmark then counts both). 1.78 M parameters,
twelve passes over the data. The aim is a greedy word error rate of at most 28%; it is not measured yet: the
loss falls from 4.2 to 1.95 nats in the first 50 steps, which is as far as it has been tried.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.steps = 12_000
    config.batch_size = 32
    config.model = dict(
        name="encoder_decoder", num_layers=3, decoder_layers=3, embed_dim=128, num_heads=4, mlp_dim=512,
        positions="rotary", norm="rmsnorm", norm_bias=False, norm_placement="pre", bias=False, activation="swiglu",
        embed_scale=1.0, dropout=0.05, embed_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    config.objective = dict(name="seq2seq", label_smoothing=0.1)
    config.optimizer = dict(name="muon", lr=8e-3, clip=1.0)
    config.schedule = dict(name="linear", warmup=200)
    config.data = dict(name="cmudict", source_length=64, length=56, packed=True)
    config.eval = dict(batch_size=256, every=2000)
    config.checkpoint = dict(every=1000)
    return config
