"""Small networks: a multilayer perceptron, LeNet-5, and a small convolutional one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class Dense(nn.Module):
    """X W + b, with W (fan-in, width): the layout in which a stack's batched products are fastest.

    Args:
        fan_in, width: numbers in and out.
    """

    def __init__(self, fan_in: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_in, width))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.weight, std=math.sqrt(2 / fan_in))  # He et al. 2015

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, fan-in) -> (B, width)."""
        return inputs @ self.weight + self.bias


class MLP(nn.Module):
    """Multilayer perceptron with ReLU on flattened inputs.

    Args:
        shape: of one input.
        hidden: widths of the hidden layers; none makes it linear.
        classes: C.
        dropout: share of the hidden units left out.
    """

    def __init__(
        self, shape: Sequence[int], hidden: Sequence[int], classes: int, dropout: float = 0.0
    ):
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, width in pairwise((math.prod(shape), *hidden)):
            layers += [Dense(fan_in, width), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
        last = hidden[-1] if hidden else math.prod(shape)
        self.layers = nn.Sequential(*layers, Dense(last, classes))

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, *shape) -> (B, C)."""
        return self.layers(inputs)


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and maxima, on images of at least 28 x 28 pixels (LeCun et al. 1998).

    Args:
        shape: (channels, height, width).
        classes: C.
        dropout: share of the units of the two fully connected layers left out.
    """

    def __init__(self, shape: Sequence[int], classes: int, dropout: float = 0.0):
        super().__init__()
        channels, height, width = image_shape("lenet5", shape, 28)
        padding = 2 if min(height, width) < 32 else 0  # 28 x 28 as 32 x 32
        sides = [((side + 2 * padding - 4) // 2 - 4) // 2 for side in (height, width)]
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = MLP((16, *sides), (120, 84), classes, dropout)
        he_initialise(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, C)."""
        return self.classifier(self.features(inputs))


class SmallCNN(nn.Module):
    """Three 3 x 3 convolutions of 16, 32 and 64 channels, each halving the image; no batch norm.

    Args:
        shape: (channels, height, width).
        classes: C.
        dropout: share of the 64 averaged features left out.
    """

    def __init__(self, shape: Sequence[int], classes: int, dropout: float = 0.0):
        super().__init__()
        channels, _, _ = image_shape("cnn", shape, 1)
        layers: list[nn.Module] = []
        for fan_in, width in pairwise((channels, 16, 32, 64)):
            layers += [nn.Conv2d(fan_in, width, 3, stride=2, padding=1), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        layers += [nn.Dropout(dropout)] if dropout else []
        self.layers = nn.Sequential(*layers, nn.Linear(64, classes))
        he_initialise(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, C)."""
        return self.layers(inputs)


def image_shape(name: str, shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    """The shape as (channels, height, width). Raises: ValueError if it is none, or too small."""
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise ValueError(
            f"model {name} must have images of at least {smallest} x {smallest} pixels, got inputs "
            f"of shape {tuple(shape)}; choose model mlp, or other data"
        )
    return shape[0], shape[1], shape[2]


def he_initialise(network: nn.Module) -> None:
    """Weights normal with variance 2 / fan-in, biases zero (He et al. 2015)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
