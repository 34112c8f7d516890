"""Mixup and label smoothing on one ResNet: Zhang et al. 2018 (arXiv:1710.09412), Szegedy et al. 2016 (1512.00567).

    bigmodel study run configs/papers/zhang2018/mixup_smoothing.py --workdir runs/mixup_smoothing --together 8
    bigmodel study report configs/papers/zhang2018/mixup_smoothing.py --workdir runs/mixup_smoothing

Mixup in its paper (figure 3a) lowers the CIFAR-10 error of a PreAct ResNet-18 from 5.6 to 4.2%; label smoothing in
its (table 3) the ImageNet top-1 error of an Inception network from 23.1 to 22.8%. Here: ResNet-14 on 500 of
scikit-learn's 8x8 digits, few enough for a regulariser to matter.

Came out, 8 seeds (results/studies/mixup_smoothing): 97.95% plain, 97.29% with mixup, 98.26% with smoothing, 97.22% with
both; all three claims are undecided. Mixup leans against its paper (-0.66 points, 98.3% interval -1.81 to 0.49; 29
seeds would settle it), smoothing for its own (+0.31, -0.50 to 1.12; 61 seeds). 8 to 9 CPU seconds a run.
"""

from ml_collections import ConfigDict

from configs import resnet_cifar10


def get_study():
    config = ConfigDict()
    config.steps = 300
    config.batch_size = 64
    config.model = dict(name="resnet", depth=14, channels=16, bn_group=64)
    config.objective = dict(name="classification")
    config.optimizer = dict(name="momentum", lr=0.1, decay="l2", weight_decay=1e-4)
    config.schedule = dict(name="cosine", warmup=10)
    config.data = dict(name="digits", limit=500, pad_crop=1, mean=(0.305,), std=(0.376,))
    config.eval = dict(every=100, batch_size=360)
    config.checkpoint = dict(every=0, keep_last=1)
    config.log = dict(every=10, tensorboard=False)
    mixup, smooth = {"data.mixup": 0.2}, {"objective.label_smoothing": 0.1}
    full = resnet_cifar10.get_config("110")
    full.data.mixup = 1.0
    return dict(
        name="mixup_smoothing",
        title="Mixup and label smoothing on one ResNet",
        source="Zhang et al. 2018 (arXiv:1710.09412), figure 3a; Szegedy et al. 2016 (arXiv:1512.00567), table 3",
        base=config,
        variants={"plain": {}, "mixup": mixup, "smoothing": smooth, "both": mixup | smooth},
        seeds=(0, 1, 2, 3, 4, 5, 6, 7),
        metric="validation/accuracy",
        mode="max",
        baseline="plain",
        claims=(
            dict(better="mixup", worse="plain", text="Mixup raises held-out accuracy"),
            dict(better="smoothing", worse="plain", text="Label smoothing raises held-out accuracy"),
            dict(better="both", worse="mixup", text="Smoothing adds to mixup"),
        ),
        published={"plain": 5.6, "mixup": 4.2},
        published_metric="CIFAR-10 error of a PreAct ResNet-18, % (less is better)",
        published_source="Zhang et al. 2018, figure 3a",
        full=full,
        budget_minutes=30,
    )
