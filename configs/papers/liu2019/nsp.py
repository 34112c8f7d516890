"""With and without next-sentence prediction: Liu et al. 2019 (arXiv:1907.11692), section 4.2, table 2.

    bigmodel study run configs/papers/liu2019/nsp.py --workdir runs/nsp --processes 2
    bigmodel study report configs/papers/liu2019/nsp.py --workdir runs/nsp

The paper finds that full rows of text without the loss match or slightly improve on pairs of spans with it, by
fine-tuned accuracy. Here as in configs/papers/devlin2019/masking.py, whose runs with 80/10/10 are the full rows: in the
same workdir they are not made twice. Pairs are two spans of about 30 tokens, of which the second is another row's half
of the time; a third variant has the same pairs and no loss, to tell what the pairs do from what the loss does.
Fine-tuning reads the mean over a text, and so does the next-sentence head here; BERT's reads the first token.
"""

from configs import bert
from configs.papers.devlin2019 import masking

LOSS = {"model.pooler": True, "model.nsp": True, "model.pooling": "mean"}


def get_study():
    rows = masking.PRETRAIN
    types = {"model.token_types": 2}
    pairs = rows | types | {"data": rows["data"] | {"name": "masked_table_pairs"}}
    full = {name: bert.get_config("base") for name in ("with", "without")}
    full["with"].data.name = "masked_pairs"
    full["with"].model.update(pooler=True, nsp=True)
    return dict(
        name="nsp",
        title="With and without next-sentence prediction",
        source="Liu et al. 2019 (arXiv:1907.11692), section 4.2, table 2",
        base=masking.base(),
        first={"full rows": rows, "pairs with the loss": pairs | LOSS, "pairs without": pairs},
        variants={
            "pairs with the loss": types | masking.start("pairs with the loss", "^pooler/", "^nsp/"),
            "pairs without": types | masking.start("pairs without"),
            "full rows": masking.start("full rows"),
        },
        seeds=(0, 1, 2, 3, 4),
        metric="validation/accuracy",
        mode="max",
        baseline="pairs with the loss",
        claims=(
            dict(
                better="full rows", worse="pairs with the loss",
                text="Full rows without the loss are better than pairs with it",
            ),
            dict(
                better="full rows", worse="pairs with the loss", margin=-0.01,
                text="Full rows without the loss are as good as pairs with it (within a point)",
            ),
            dict(better="pairs with the loss", worse="pairs without", text="On pairs the loss helps"),
        ),
        published={"pairs with the loss": 92.9, "full rows": 92.5},
        published_metric="SST-2 accuracy after fine-tuning, %, books and Wikipedia (on MNLI-m 84.0 and 84.7)",
        published_source="Liu et al. 2019, table 2: SEGMENT-PAIR with NSP, FULL-SENTENCES without",
        full=full,
        budget_minutes=60,
    )  # fmt: skip
