"""Residual against plain networks as depth grows: He et al. 2016 (arXiv:1512.03385), 4.2, figure 6 and table 6.

    bigmodel study run configs/papers/he2016/plain_vs_residual.py --workdir runs/plain_vs_residual --together 5
    bigmodel train --config configs/papers/he2016/plain_vs_residual.py:residual44 --workdir runs/residual44

The paper trains depths 20 to 110 for 64,000 steps on CIFAR-10. Here: the same networks at half the width, depths 8,
20 and 44, on 8x8 digits for 300 steps: 4 to 17 CPU seconds a cell, the five seeds of a variant in one program. The
paper's claim has two halves: plain networks get worse with depth, residual ones do not.

Came out, 5 seeds (results/studies/plain_vs_residual): held-out loss 0.062, 0.560 and 1.614 of plain networks, 0.059,
0.066 and 0.102 of residual ones. The half of plain networks is supported (all three claims p < 0.001 after Holm), that
of residual ones contradicted: depth 44 ends 0.043 above depth 8 (0.024 to 0.062), beyond the margin of 0.02. Added
after the runs, so that the table says what its numbers show. 300 steps leave the deep networks half trained (the plain
one of 44 layers is right on 29 to 44% of the digits), and small digits need no depth; the paper trains 64,000 steps.
"""

from ml_collections import ConfigDict

from configs import resnet_cifar10

DEPTHS = (8, 20, 44)


def get_study():
    config = ConfigDict()
    config.steps = 300
    config.batch_size = 64
    config.model = dict(name="resnet", depth=20, channels=8, zero_init=False, bn_group=64)
    config.objective = dict(name="classification")
    config.optimizer = dict(name="momentum", lr=0.1, decay="l2", weight_decay=1e-4, groups=((".*", {}),))
    config.schedule = dict(name="piecewise", boundaries=(0.5, 0.75), factor=0.1, warmup=10)
    config.data = dict(name="digits", pad_crop=1, mean=(0.305,), std=(0.376,))
    config.eval = dict(every=100, batch_size=360)
    config.checkpoint = dict(every=150)
    config.log = dict(every=10, tensorboard=False)
    return dict(
        name="plain_vs_residual",
        title="Residual against plain networks as depth grows",
        source="He et al. 2016 (arXiv:1512.03385), section 4.2, figure 6 and table 6",
        base=config,
        variants={
            f"{kind}{depth}": {"model.shortcut": kind == "residual", "model.depth": depth}
            for kind in ("plain", "residual")
            for depth in DEPTHS
        },
        seeds=(0, 1, 2, 3, 4),
        metric="validation/loss",
        mode="min",
        baseline="plain8",
        claims=(
            dict(better="residual44", worse="plain44", text="At depth 44 the residual network is better"),
            dict(better="plain8", worse="plain44", text="A plain network gets worse as it gets deeper"),
            dict(better="residual20", worse="plain20", text="At depth 20 the residual network is better"),
            dict(
                better="residual44",
                worse="residual8",
                margin=-0.02,
                text="A residual network gets no worse as it gets deeper (within 0.02 nats)",
            ),
        ),
        # Plain networks are in figure 6 only, as curves; table 6 has the residual ones.
        published={"residual20": 8.75, "residual44": 7.17},
        published_metric="test error on CIFAR-10, %",
        published_source="He et al. 2016, table 6 (ResNet-20 and ResNet-44)",
        full={name: resnet_cifar10.get_config(arg) for name, arg in (("plain", "plain56"), ("residual", "56"))},
        budget_minutes=30,
    )
