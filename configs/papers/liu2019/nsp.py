"""With and without next-sentence prediction: Liu et al. 2019 (arXiv:1907.11692), section 4.2, table 2.

    bigmodel study run configs/papers/liu2019/nsp.py --workdir runs/nsp --processes 2
    bigmodel study report configs/papers/liu2019/nsp.py --workdir runs/nsp

The paper finds that dropping the loss matches or slightly improves fine-tuned accuracy. Here nothing is fine-tuned: on
the same pairs of spans of Python's standard library the question is what the second loss does to the first, by
held-out masked accuracy. Rows of two spans, of which the second is another row's half of the time, are the same for
both; the model without the loss is not asked whether they belong together.
"""

from ml_collections import ConfigDict

from configs import bert


def get_study():
    config = ConfigDict()
    config.steps = 800
    config.batch_size = 32
    config.model = dict(
        name="encoder", num_layers=3, embed_dim=96, num_heads=3, mlp_dim=384, max_length=96, token_types=2,
        norm_placement="pre", embed_norm=False, dropout=0.0, attention_dropout=0.0, embed_dropout=0.0, pooler=True,
        nsp=True,
    )  # fmt: skip
    config.objective = dict(name="masked_lm")
    config.optimizer = dict(name="muon", lr=8e-3, clip=1.0)
    config.schedule = dict(name="linear", warmup=40)
    config.data = dict(
        name="masked_pairs", corpus="stdlib", tokenizer="bpe", vocab_size=1024, length=96, validation_fraction=0.02
    )
    config.eval = dict(every=200, batch_size=128)
    config.checkpoint = dict(every=0, keep_last=1)
    config.log = dict(every=10, tensorboard=False)
    full = {name: bert.get_config("base") for name in ("with", "without")}
    for config_at_scale in full.values():
        config_at_scale.data.name = "masked_pairs"
    full["with"].model.update(pooler=True, nsp=True)
    return dict(
        name="nsp",
        title="With and without next-sentence prediction",
        source="Liu et al. 2019 (arXiv:1907.11692), section 4.2, table 2",
        base=config,
        variants={"with": {}, "without": {"model.nsp": False, "model.pooler": False}},
        seeds=(0, 1, 2, 3, 4),
        metric="validation/accuracy",
        mode="max",
        baseline="with",
        claims=(
            dict(better="without", worse="with", text="Masked accuracy is better without the second loss"),
            dict(
                better="without",
                worse="with",
                margin=-0.005,
                text="Nothing is lost without it (within half a point of masked accuracy)",
            ),
        ),
        published={"with": 84.0, "without": 84.7},
        published_metric="MNLI-m accuracy after fine-tuning, %: pairs of segments with NSP, full sentences without",
        published_source="Liu et al. 2019, table 2",
        full=full,
        budget_minutes=40,
    )
