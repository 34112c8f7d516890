"""Masked against left-to-right pretraining: Devlin et al. 2019 (arXiv:1810.04805), section 5.1, table 5.

    bigmodel study run configs/papers/devlin2019/directions.py --workdir runs/directions --processes 2
    bigmodel study report configs/papers/devlin2019/directions.py --workdir runs/directions

As configs/papers/devlin2019/masking.py, whose runs with 80/10/10 are the masked ones here: in the same workdir they are
not made twice. The left-to-right model is the
same network with a causal mask in both stages, as in the paper. It learns from every token and the masked one from 15%
of them in as many steps, as there.
"""

from configs import bert
from configs.papers.devlin2019 import masking


def get_study():
    causal = {"model": masking.base().model.to_dict() | {"name": "decoder"}}
    del causal["model"]["token_types"], causal["model"]["embed_norm"]
    left_to_right = masking.PRETRAIN | {
        "model": causal["model"] | {"head": "lm", "dropout": 0.0, "embed_dropout": 0.0},
        "objective": {"name": "causal_lm"},
        "data": {"name": "causal_table", "stream": True, **masking.TEXTS},
    }
    for leaf in ("model.head", "model.dropout", "model.embed_dropout"):
        del left_to_right[leaf]
    return dict(
        name="directions",
        title="Masked against left-to-right pretraining",
        source="Devlin et al. 2019 (arXiv:1810.04805), section 5.1, table 5",
        base=masking.base(),
        first={"masked": masking.PRETRAIN, "left-to-right": left_to_right},
        variants={
            "masked": masking.start("masked"),
            "left-to-right": causal | masking.start("left-to-right"),
            "both ways, from scratch": {},
            "left-to-right, from scratch": causal,
        },
        seeds=(0, 1, 2, 3, 4),
        metric="validation/accuracy",
        mode="max",
        baseline="masked",
        claims=(
            dict(better="masked", worse="left-to-right", text="Masked pretraining is better than left-to-right"),
            dict(better="masked", worse="both ways, from scratch", text="Masked pretraining helps"),
            dict(better="left-to-right", worse="left-to-right, from scratch", text="Left-to-right pretraining helps"),
        ),
        published={"masked": 92.6, "left-to-right": 92.1},
        published_metric="SST-2 accuracy after fine-tuning, %, both without NSP",
        published_source="Devlin et al. 2019, table 5",
        full={"masked": bert.get_config("base"), "left-to-right": left_to_right_at_scale()},
        budget_minutes=60,
    )


def left_to_right_at_scale():
    """The same sizes and text with a causal mask."""
    config = bert.get_config("base")
    config.model.name, config.objective.name, config.data.name = "decoder", "causal_lm", "text"
    return config
