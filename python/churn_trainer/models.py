"""Many small networks trained as one: every weight has a leading dimension of M models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class BatchedMLP(nn.Module):
    """M independent multilayer perceptrons with ReLU, computed together with batched products.

    Model m depends on seed m alone: not on M, nor on its neighbours.

    Args:
        widths: F, hidden widths, C.
        seeds: M seeds. Weights are normal with variance 2 / fan-in (He et al. 2015), biases zero.
    """

    def __init__(self, widths: Sequence[int], seeds: Sequence[int]):
        super().__init__()
        layers = list(pairwise(widths))
        drawn = [_draw_weights(layers, seed) for seed in seeds]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.stack(weights)) for weights in zip(*drawn, strict=True)
        )
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(len(seeds), 1, width)) for width in widths[1:]
        )

    def forward(self, features: Tensor) -> Tensor:
        """(M, B, F) -> (M, B, C): model m sees features[m]."""
        return _layers(features, list(self.weights), list(self.biases))

    @torch.no_grad()
    def predict(self, features: Tensor, models: slice) -> Tensor:
        """(m, B, F) -> (m, B, C) logits of the m models of a slice, without gradient."""
        weights = [weight[models] for weight in self.weights]
        return _layers(features, weights, [bias[models] for bias in self.biases])


def _layers(features: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    values = torch.baddbmm(biases[0], features, weights[0])
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        values = torch.baddbmm(bias, values.relu(), weight)
    return values


def _draw_weights(layers: Sequence[tuple[int, int]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(fan_in, fan_out, generator=generator) * math.sqrt(2 / fan_in)
        for fan_in, fan_out in layers
    ]
