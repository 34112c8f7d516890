"""ResNet-20, 56, 110 and their plain twins on CIFAR-10: He et al. 2015 (arXiv:1512.03385), 4.2.

    bigmodel train --config configs/resnet_cifar10.py:56 --workdir runs/resnet56
    bigmodel train --config configs/resnet_cifar10.py:plain56 --workdir runs/plain56

64,000 steps of 128 images, rate 0.1 divided by 10 at 32,000 and 48,000, momentum 0.9, weight decay
1e-4 as L2 on everything, 4 pixels of padding with random crops, and flips; shortcuts without
parameters (option A). ResNet-110 first warms up at a tenth of the rate in the paper; here its rate
rises linearly over 400 steps. Residual branches do not start at 0, as then they did not. The paper's
test errors: 8.75% (20), 6.97% (56), 6.43% (110; best of five, mean 6.61%); plain networks get worse
with depth (figure 6).

Needs the TFDS data set cifar10 on disk (163 MB). Lowered, not trained, by this project.
"""

from ml_collections import ConfigDict

ARGS = tuple(f"{kind}{depth}" for kind in ("", "plain") for depth in (20, 56, 110))


def get_config(arg="20"):
    depth = int(arg.removeprefix("plain"))
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 128
    config.steps = 64_000
    config.model = dict(
        name="resnet", depth=depth, shortcut=not arg.startswith("plain"), zero_init=False, bn_group=64,
        num_classes=10, in_channels=3,
    )  # fmt: skip
    config.objective = dict(name="classification")
    config.optimizer = dict(name="momentum", lr=0.1, decay="l2", weight_decay=1e-4, groups=((".*", {}),))
    config.schedule = dict(name="piecewise", boundaries=(32_000, 48_000), factor=0.1, warmup=400 if depth == 110 else 0)
    config.data = dict(
        name="tfds_images", dataset="cifar10", train="train", test="test", size=32, channels=3, pad_crop=4,
        flip=True, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
    )  # fmt: skip
    config.eval = dict(every=2000, batch_size=256)
    config.checkpoint = dict(every=4000)
    return config
