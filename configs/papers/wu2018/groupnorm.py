"""Batch norm against group norm at small batches: Wu & He 2018 (arXiv:1803.08494), table 2 and figure 4.

    bigmodel study run configs/papers/wu2018/groupnorm.py --workdir runs/groupnorm --together 5
    bigmodel study report configs/papers/wu2018/groupnorm.py --workdir runs/groupnorm

In the paper the batch of a GPU shrinks from 32 to 2 images, and the learning rate with it; batch norm normalises over
a GPU's images. Here the batch stays at 64 and batch norm's groups shrink from 32 to 2 (model.bn_group), which varies
the normalisation alone; group norm does not see the difference, so it is one variant. ResNet-14 of 16 channels on 8x8
digits in place of ResNet-50 on ImageNet.

Came out, 5 seeds (results/studies/groupnorm): every variant ends between 98.2% and 98.8%, and all four claims are
undecided. Groups of 2 rows end 0.28 points below groups of 32 (98.75% interval -0.10 to 0.66), where the paper has 11
points: images this small leave little to lose. Nine seeds would settle the first claim, 38 to 164 the others. 10 to 14
CPU seconds a run, the five seeds of a variant in one program.
"""

from ml_collections import ConfigDict

from configs import resnet_imagenet


def get_study():
    config = ConfigDict()
    config.steps = 500
    config.batch_size = 64
    config.model = dict(name="resnet", depth=14, channels=16, bn_group=32)
    config.objective = dict(name="classification")
    config.optimizer = dict(name="momentum", lr=0.1, decay="l2", weight_decay=1e-4)
    config.schedule = dict(name="cosine", warmup=10)
    config.data = dict(name="digits", pad_crop=1, rotate=10.0, mean=(0.305,), std=(0.376,))
    config.eval = dict(every=100, batch_size=360)
    config.checkpoint = dict(every=0, keep_last=1)
    config.log = dict(every=10, tensorboard=False)
    variants = {f"batch norm of {rows}": {"model.bn_group": rows} for rows in (32, 16, 8, 4, 2)}
    variants["group norm"] = {"model.norm": "group", "model.gn_groups": 4}
    full = {norm: resnet_imagenet.get_config("50") for norm in ("batch", "group")}
    full["group"].model.norm = "group"
    return dict(
        name="groupnorm",
        title="Batch norm against group norm at small batches",
        source="Wu & He 2018 (arXiv:1803.08494), table 2 and figure 4",
        base=config,
        variants=variants,
        seeds=(0, 1, 2, 3, 4),
        metric="validation/accuracy",
        mode="max",
        baseline="group norm",
        claims=(
            dict(better="batch norm of 32", worse="batch norm of 2", text="Batch norm gets worse with few images"),
            dict(better="group norm", worse="batch norm of 2", text="At 2 images, group norm is better"),
            dict(better="group norm", worse="batch norm of 4", text="At 4 images, group norm is better"),
            dict(better="batch norm of 32", worse="group norm", text="At 32 images, batch norm is a little better"),
        ),
        published={
            "batch norm of 32": 23.6, "batch norm of 16": 23.7, "batch norm of 8": 24.8, "batch norm of 4": 27.3,
            "batch norm of 2": 34.7, "group norm": 24.1,
        },
        published_metric="ImageNet error of ResNet-50, % (less is better; group norm: 24.0 to 24.2 at any batch)",
        published_source="Wu & He 2018, table 2",
        full=full,
        budget_minutes=30,
    )  # fmt: skip
