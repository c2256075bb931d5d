"""Batch norm with what follows it.

Batch norm, the sum with a shortcut and ReLU are eleven kernels of torch's, forward and backward, and read or write an
activation sixteen times; here they are four and ten.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .making import Grid, multiprocessors, run, same

THREADS, WIDEST = 512, 32
"""Threads of a block that goes over rows, of these across at most; the source has them, too."""
ROWS, ENOUGH, MANY = 4, 64, 32
"""Rows that a thread has at least. Blocks that add up are no more than `ENOUGH`, as the next kernel reads what each has
left, until a thread would have more than `MANY` rows; then they are as many as there are multiprocessors."""
WRITING = 2
"""Blocks per multiprocessor that write."""


def _grids(like: Tensor) -> tuple[Grid, Grid]:
    """Blocks and threads that add up, and that write: across for columns of eight channels, down for rows."""
    rows, columns = _rows(like)
    wide = min(WIDEST, 1 << (columns - 1).bit_length())
    high, tiles, here = THREADS // wide, -(-columns // wide), multiprocessors(like.device)
    enough = -(-rows // (ROWS * high))
    adding = min(max(-(-rows // (MANY * high)), min(ENOUGH, enough)), max(here // tiles, 1))
    writing = min(enough, max(WRITING * here // tiles, 1))
    return ((tiles, adding, 1), (wide, high, 1)), ((tiles, writing, 1), (wide, high, 1))


def _rows(like: Tensor) -> tuple[int, int]:
    n, channels, height, width = like.shape
    return n * height * width, channels // 8


class BatchNorm(torch.autograd.Function):
    """relu(batch norm of x + residual), for `fit(x, residual)`; running mean and variance are moved.

    With `twice` it comes twice, once for each of two who use it: so their gradients are added up on the way.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, norm: nn.BatchNorm2d, relu: bool, twice: bool, *_: Tensor
    ) -> tuple[Tensor, ...]:
        """`_` is weight and bias of the norm, in training, whose gradients are wanted."""
        (rows, columns), (adding, writing), has = _rows(x), _grids(x), residual is not None
        partial, mean, invstd = _sums(x, adding), _per_channel(x), _per_channel(x)
        run("distances", adding, [x, rows, columns, partial])
        y = torch.empty_like(x)
        positive = torch.empty(rows * columns if relu else 0, dtype=torch.uint8, device=x.device)
        given = [x, residual if has else x, rows, columns, partial, len(partial), norm.weight, norm.bias]
        how = [float(norm.momentum or 0), norm.eps, has, relu]
        left = [mean, invstd, norm.running_mean, norm.running_var, y, positive]
        run("normalise", writing, [*given, *how, *left], early=True)
        ctx.save_for_backward(x, positive, mean, invstd, norm.weight)
        ctx.relu, ctx.has_residual, ctx.twice = relu, has, twice
        return (y, same(y)) if twice else (y,)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, positive, mean, invstd, weight = ctx.saved_tensors
        (rows, columns), (adding, writing), relu = _rows(x), _grids(x), ctx.relu
        dy, *others = (gradient.contiguous(memory_format=torch.channels_last) for gradient in gradients)
        partial, dweight, dbias = _sums(x, adding), _per_channel(x), _per_channel(x)
        wanted = ctx.twice or (relu and ctx.has_residual)  # the sum of the gradients, as the ReLU lets it through
        through = torch.empty_like(x) if wanted else dy
        given = [dy, others[0] if others else dy, x, positive, rows, columns, mean]
        run("products", adding, [*given, ctx.twice, relu, wanted, partial, through])
        dx = torch.empty_like(x)
        given = [through, x, positive, rows, columns, partial, len(partial), mean, invstd, weight]
        run("gradient", writing, [*given, relu and not wanted, dweight, dbias, dx], early=True)
        return dx, through if ctx.has_residual else None, None, None, None, dweight, dbias


def _per_channel(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


def _sums(x: Tensor, adding: Grid) -> Tensor:
    """What each block leaves."""
    return x.new_empty(adding[0][1], 2, x.shape[1], dtype=torch.float32)


def normable(norm: nn.BatchNorm2d) -> bool:
    """Whether `BatchNorm` does what the module does: learn scale and offset, and follow the statistics by a share."""
    return norm.affine and norm.track_running_stats and norm.momentum is not None
