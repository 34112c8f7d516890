"""The peer of bigmodel_jax.models.resnet in torch: the same network, for timing and for parity.

ResNet v1.5 (He et al. 2015, stride on the 3x3 convolution) with batch norm, ImageNet or CIFAR stem.
Needs only torch. `step_fn` gives one training step (forward, backward, Nesterov momentum with L2),
in channels_last memory format, which is torch's fast one on CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

BLOCKS = {
    18: (1, (2, 2, 2, 2)),
    34: (1, (3, 4, 6, 3)),
    50: (4, (3, 4, 6, 3)),
    101: (4, (3, 4, 23, 3)),
    152: (4, (3, 8, 36, 3)),
}


class Block(nn.Module):
    """Basic (expansion 1) or bottleneck (4) residual block."""

    def __init__(self, channels: int, features: int, stride: int, expansion: int):
        super().__init__()
        sizes = [(features, 3, stride), (features, 3, 1)]
        if expansion == 4:
            sizes = [(features, 1, 1), (features, 3, stride), (4 * features, 1, 1)]
        layers: list[nn.Module] = []
        before = channels
        for i, (width, kernel, step) in enumerate(sizes):
            layers.append(nn.Conv2d(before, width, kernel, step, kernel // 2, bias=False))
            layers.append(nn.BatchNorm2d(width))
            if i < len(sizes) - 1:
                layers.append(nn.ReLU(inplace=True))
            before = width
        self.branch = nn.Sequential(*layers)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels != before:
            self.skip = nn.Sequential(nn.Conv2d(channels, before, 1, stride, bias=False), nn.BatchNorm2d(before))
        self.out = before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu_(self.branch(x) + self.skip(x))


def build(depth: int, num_classes: int = 1000, stem: str = "imagenet") -> nn.Module:
    """Image [B, 3, H, W] -> logits [B, num_classes]. He initialisation, last scale of a branch 0."""
    expansion, counts = BLOCKS[depth]
    first: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False)]
    if stem == "imagenet":
        first = [nn.Conv2d(3, 64, 7, 2, 3, bias=False)]
    layers = [*first, nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    if stem == "imagenet":
        layers.append(nn.MaxPool2d(3, 2, 1))
    channels = 64
    for stage, count in enumerate(counts):
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            layers.append(Block(channels, 64 * 2**stage, stride, expansion))
            channels = layers[-1].out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, Block):
            nn.init.zeros_(module.branch[-1].weight)
    return model.to(memory_format=torch.channels_last)


def step_fn(depth: int, side: int, batch: int, num_classes: int = 1000, stem: str = "imagenet") -> Callable[[], float]:
    """A closure that runs one training step on fixed random images and returns the loss."""
    torch.manual_seed(0)
    model = build(depth, num_classes, stem).train()
    image = torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    label = torch.randint(num_classes, (batch,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(image), label)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
