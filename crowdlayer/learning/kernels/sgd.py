"""Stochastic gradient descent by gradients in bfloat16: torch's wants them in float32, and a few blocks for a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from .making import EACH, run

AT_ONCE = 4
"""Weights of a thread; the source has it, too."""


def sgd(weight: Tensor, velocity: Tensor | None, gradient: Tensor, rate: Tensor, momentum: float, decay: float) -> None:
    """Move a weight in float32 by a gradient in bfloat16, and its velocity, None without momentum, as torch's SGD does.

    Args:
        weight: of any shape, dense.
        velocity: like the weight, torch's momentum buffer.
        gradient: of the weight's shape.
        rate: (), on the device.
        momentum: the share of the velocity that stays.
        decay: the share of the weight that is added to its gradient.
    """
    gradient = laid_out_as(weight, gradient)
    blocks = -(-weight.numel() // (EACH * AT_ONCE))
    given = [weight, weight if velocity is None else velocity, gradient, rate, weight.numel(), momentum, decay]
    run("sgd", ((blocks, 1, 1), (EACH, 1, 1)), given)


def laid_out_as(like: Tensor, tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where its numbers lie in another order."""
    strides = zip(like.shape, like.stride(), tensor.stride(), strict=True)
    if all(size == 1 or one == other for size, one, other in strides):
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
