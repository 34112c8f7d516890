"""ResNet-18, 34, 50, 101 and 152 (v1.5) on ImageNet: the 90-epoch recipe of Goyal et al. 2017.

    bigmodel train --config configs/resnet_imagenet.py:50 --workdir runs/resnet50

arXiv:1706.02677, section 5.1: batch 1024, learning rate 0.1 per 256 images with 5 epochs of linear
warm-up, Nesterov momentum 0.9, weight decay 1e-4 as L2 and none on norms and biases, last scale of
each branch starts at 0, random resized crops and flips. As later recipes do, the rate decays by a
cosine (He et al. 2019, arXiv:1812.01187) and labels are smoothed by 0.1 (Szegedy et al. 2016).
Batch norm sees groups of 32 rows whatever the number of devices, as in the paper.

Random crops are cut from the picture scaled to a short side of 256 and cut square, not from the
file as it is: a little less of the edges and of the detail than in the paper.

Needs the TFDS data set imagenet2012 on disk. Lowered, not trained, by this project.
"""

from ml_collections import ConfigDict

ARGS = ("18", "34", "50", "101", "152")


def get_config(arg="50"):
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 1024
    epoch = 1_281_167 / config.batch_size
    config.steps = round(90 * epoch)
    config.model = dict(
        name="resnet", depth=int(arg), version="v1.5", bn_group=32, num_classes=1000, in_channels=3,
        dtype="bfloat16",
    )  # fmt: skip
    config.objective = dict(name="classification", label_smoothing=0.1)
    config.optimizer = dict(name="nesterov", lr=0.4, decay="l2", weight_decay=1e-4)
    config.schedule = dict(name="cosine", warmup=round(5 * epoch))
    config.data = dict(
        name="tfds_images", dataset="imagenet2012", train="train", test="validation", stored=256,
        size=224, channels=3, flip=True, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    config.eval = dict(every=round(5 * epoch), batch_size=1024)
    config.checkpoint = dict(every=round(epoch), keep_every=round(30 * epoch))
    return config
