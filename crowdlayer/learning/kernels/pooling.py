"""Max pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from .making import EACH, Grid, run, same


class MaxPool(torch.autograd.Function):
    """Max pooling of x, for `fit(x)` and `poolable`; with `twice` it comes twice, as from `BatchNorm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: nn.MaxPool2d, twice: bool) -> tuple[Tensor, ...]:
        side, stride, padding = _window(pool)
        n, channels, height, width = x.shape
        down, across = ((edge + 2 * padding - side) // stride + 1 for edge in (height, width))
        y = x.new_empty(n, down, across, channels).permute(0, 3, 1, 2)
        ctx.window = [channels // 8, height, width, down, across, side, stride, padding]
        place = torch.empty(y.numel(), dtype=torch.uint8, device=x.device)
        run("largest", _by_row(y), [x, *ctx.window, y, place])
        ctx.save_for_backward(place)
        ctx.like, ctx.twice = x.shape, twice
        return (y, same(y)) if twice else (y,)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        dy, *others = (gradient.contiguous(memory_format=torch.channels_last) for gradient in gradients)
        dx = torch.empty(ctx.like, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
        given = [dy, others[0] if others else dy, place, ctx.twice]
        run("of_largest", _by_row(dx), [*given, *ctx.window, dx])
        return dx, None, None


def _by_row(like: Tensor) -> Grid:
    """A thread for each eight channels of a pixel."""
    n, channels, height, width = like.shape
    return (n * height, -(-width * channels // (8 * EACH)), 1), (EACH, 1, 1)


def _window(pool: nn.MaxPool2d) -> tuple[int, int, int]:
    """Side, stride and padding of a square window."""
    side, stride, padding = (_pair(part)[0] for part in (pool.kernel_size, pool.stride, pool.padding))
    return side, stride, padding


def poolable(pool: nn.MaxPool2d) -> bool:
    """Whether `MaxPool` knows such a window: a square one, of a place in a byte."""
    pairs = [_pair(part) for part in (pool.kernel_size, pool.stride, pool.padding)]
    plain = _pair(pool.dilation) == (1, 1) and not (pool.ceil_mode or pool.return_indices)
    return plain and all(down == across for down, across in pairs) and pairs[0][0] <= 15
