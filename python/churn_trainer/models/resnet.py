"""Residual networks: version 1 for CIFAR, version 2 with bottlenecks for ImageNet."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from churn_trainer.models.networks import he_initialise, image_shape


def resnet32(shape: Sequence[int], classes: int) -> nn.Module:
    """ResNet-32: [(5, 16, 1), (5, 32, 2), (5, 64, 2)], (blocks, channels, first stride)."""
    return CifarResNet("resnet32", shape, classes, 5)


def resnet56(shape: Sequence[int], classes: int) -> nn.Module:
    """ResNet-56: [(9, 16, 1), (9, 32, 2), (9, 64, 2)], (blocks, channels, first stride)."""
    return CifarResNet("resnet56", shape, classes, 9)


def resnet_v2_50(shape: Sequence[int], classes: int) -> nn.Module:
    """ResNet-v2-50: [(3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)], bottlenecks of 4 x."""
    return ResNetV2("resnet-v2-50", shape, classes, (3, 4, 6, 3))


class CifarResNet(nn.Module):
    """The CIFAR networks of He et al. 2015, Sec. 4.2: 6 n + 2 layers, shortcuts without weights.

    Args:
        name: for messages.
        shape: (channels, height, width).
        classes: C.
        blocks: n blocks at each of the three sizes.
    """

    def __init__(self, name: str, shape: Sequence[int], classes: int, blocks: int):
        super().__init__()
        channels, _, _ = image_shape(name, shape, 4)
        layers: list[nn.Module] = [
            nn.Conv2d(channels, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        ]
        width = 16
        for out, stride in ((16, 1), (32, 2), (64, 2)):
            for block in range(blocks):
                layers.append(_BasicBlock(width, out, stride if block == 0 else 1))
                width = out
        self.layers = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)
        )
        he_initialise(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, C)."""
        return self.layers(inputs)


class _BasicBlock(nn.Module):
    """relu(x + f(x)), f two 3 x 3 convolutions; the shortcut skips pixels, pads channels."""

    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(out)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(out)
        self.stride, self.added = stride, out - width

    def forward(self, inputs: Tensor) -> Tensor:
        values = F.relu(self.first_norm(self.first(inputs)))
        values = self.second_norm(self.second(values))
        shortcut = inputs[:, :, :: self.stride, :: self.stride]
        before = self.added // 2
        return F.relu(values + F.pad(shortcut, (0, 0, 0, 0, before, self.added - before)))


class ResNetV2(nn.Module):
    """The pre-activation networks of He et al. 2016, with bottlenecks.

    Args:
        name: for messages.
        shape: (channels, height, width).
        classes: C.
        blocks: number of blocks at each size; widths 64, 128, 256, 512, four times that outside.
    """

    def __init__(self, name: str, shape: Sequence[int], classes: int, blocks: Sequence[int]):
        super().__init__()
        channels, _, _ = image_shape(name, shape, 32)
        layers: list[nn.Module] = [
            nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False),
            nn.MaxPool2d(3, stride=2, padding=1),
        ]
        width = 64
        for size, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if block == 0 and size > 0 else 1
                layers.append(_Bottleneck(width, 64 * 2**size, stride))
                width = 4 * 64 * 2**size
        self.layers = nn.Sequential(
            *layers,
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, classes),
        )
        he_initialise(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, C)."""
        return self.layers(inputs)


class _Bottleneck(nn.Module):
    """x + f(relu(norm(x))), f of 1 x 1, 3 x 3 and 1 x 1 convolutions."""

    def __init__(self, width: int, inner: int, stride: int):
        super().__init__()
        out = 4 * inner
        self.norm = nn.BatchNorm2d(width)
        self.residual = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, out, 1, bias=False),
        )
        projects = stride != 1 or width != out
        self.shortcut = nn.Conv2d(width, out, 1, stride=stride, bias=False) if projects else None

    def forward(self, inputs: Tensor) -> Tensor:
        active = F.relu(self.norm(inputs))
        shortcut = inputs if self.shortcut is None else self.shortcut(active)
        return shortcut + self.residual(active)
