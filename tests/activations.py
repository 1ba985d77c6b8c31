"""Inputs of a layer as a language model's are: strongly correlated, and of very different sizes."""

import torch
from torch import Tensor


def activations(features: int, tokens: int = 2048) -> tuple[Tensor, Tensor]:
    """Two samples `[tokens, features]` of one distribution: one to calibrate with, one to measure on."""
    mixing = torch.randn(features, features) * (torch.arange(features) + 1.0) ** -0.5  # variances fall as 1 / i
    sizes = torch.randn(features).exp()
    x = torch.randn(2 * tokens, features) @ mixing.T + 0.1 * torch.randn(2 * tokens, features)
    first, second = (x * sizes).split(tokens)
    return first, second


def second_moment(x: Tensor) -> Tensor:
    """E[x xᵀ] of `[tokens, features]`, float64."""
    wide = x.double()
    return wide.T @ wide / len(x)
