"""CUDA kernels of our own (kernels.cu): batch norm with what follows it, and max pooling, in bfloat16, channels last.

Batch norm, the sum with a shortcut and ReLU are eleven kernels of torch's, forward and backward, and read or write an
activation sixteen times; here they are four and ten. CUDA's runtime compiler, which torch brings along, makes them
when they are first wanted: no compiler is needed on the machine.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from ..errors import one_line

log = logging.getLogger(__name__)

Grid = tuple[tuple[int, int, int], tuple[int, int, int]]
"""Blocks and threads per block."""

NAMES = ("distances", "normalise", "products", "gradient", "largest", "of_largest")
THREADS, WIDEST, EACH = 512, 32, 256
"""Threads of a block that goes over rows, of these across at most, and of another block; kernels.cu has them too."""
ROWS, ENOUGH, MANY = 4, 64, 32
"""Rows that a thread has at least. Blocks that add up are no more than `ENOUGH`, as the next kernel reads what each has
left, until a thread would have more than `MANY` rows; then they are as many as there are multiprocessors."""
WRITING = 2
"""Blocks per multiprocessor that write."""


@cache
def kernels(device: torch.device) -> dict[str, Any] | None:
    """The kernels by their names, or None where they cannot be had, which on a GPU the log says."""
    if device.type != "cuda":
        return None
    try:
        from torch.cuda._utils import _cuda_load_module, _nvrtc_compile

        source = Path(__file__).with_suffix(".cu").read_text()
        major, minor = torch.cuda.get_device_capability(device)
        binary, *_ = _nvrtc_compile(source, NAMES[0], f"{major}{minor}")
        made: dict[str, Any] = _cuda_load_module(binary, list(NAMES))  # type: ignore[assignment]
    except Exception as error:  # torch's way to the compiler is not one that it has promised to keep
        log.info("no kernels of our own, torch's do as well: %s", one_line(str(error)))
        return None
    return made


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _run(name: str, grid: Grid, arguments: Sequence[Any]) -> None:
    """Launch a kernel; its first argument is a tensor."""
    found = kernels(arguments[0].device)
    assert found is not None
    found[name](*grid, list(arguments))


def _grids(like: Tensor) -> tuple[Grid, Grid]:
    """Blocks and threads that add up, and that write: across for columns of eight channels, down for rows."""
    rows, columns = _rows(like)
    wide = min(WIDEST, 1 << (columns - 1).bit_length())
    high, tiles, here = THREADS // wide, -(-columns // wide), _multiprocessors(like.device)
    enough = -(-rows // (ROWS * high))
    adding = min(max(-(-rows // (MANY * high)), min(ENOUGH, enough)), max(here // tiles, 1))
    writing = min(enough, max(WRITING * here // tiles, 1))
    return ((tiles, adding, 1), (wide, high, 1)), ((tiles, writing, 1), (wide, high, 1))


def _rows(like: Tensor) -> tuple[int, int]:
    n, channels, height, width = like.shape
    return n * height * width, channels // 8


def fit(*tensors: Tensor) -> bool:
    """Whether the kernels are made for such tensors, (n, channels, height, width), and can be had."""
    one = tensors[0]
    return (
        all(t.dtype == torch.bfloat16 and t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
        and all(t.shape == one.shape for t in tensors)
        and one.shape[1] % 8 == 0
        and one.shape[1] < one.numel() < 2**31
        and kernels(one.device) is not None
    )


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
        _run("distances", adding, [x, rows, columns, partial])
        y = torch.empty_like(x)
        positive = torch.empty(rows * columns if relu else 0, dtype=torch.uint8, device=x.device)
        given = [x, residual if has else x, rows, columns, partial, len(partial), norm.weight, norm.bias]
        how = [float(norm.momentum or 0), norm.eps, has, relu]
        _run("normalise", writing, [*given, *how, mean, invstd, norm.running_mean, norm.running_var, y, positive])
        ctx.save_for_backward(x, positive, mean, invstd, norm.weight)
        ctx.relu, ctx.has_residual, ctx.twice = relu, has, twice
        return (y, _same(y)) if twice else (y,)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, positive, mean, invstd, weight = ctx.saved_tensors
        (rows, columns), (adding, writing), relu = _rows(x), _grids(x), ctx.relu
        dy, *others = (gradient.contiguous(memory_format=torch.channels_last) for gradient in gradients)
        partial, dweight, dbias = _sums(x, adding), _per_channel(x), _per_channel(x)
        wanted = ctx.twice or (relu and ctx.has_residual)  # the sum of the gradients, as the ReLU lets it through
        through = torch.empty_like(x) if wanted else dy
        given = [dy, others[0] if others else dy, x, positive, rows, columns, mean]
        _run("products", adding, [*given, ctx.twice, relu, wanted, partial, through])
        dx = torch.empty_like(x)
        given = [through, x, positive, rows, columns, partial, len(partial), mean, invstd, weight]
        _run("gradient", writing, [*given, relu and not wanted, dweight, dbias, dx])
        return dx, through if ctx.has_residual else None, None, None, None, dweight, dbias


def _same(y: Tensor) -> Tensor:
    """The same memory, in a tensor of its own: no view, of which autograd would have to know."""
    return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())


def _per_channel(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


def _sums(x: Tensor, adding: Grid) -> Tensor:
    """What each block leaves."""
    return x.new_empty(adding[0][1], 2, x.shape[1], dtype=torch.float32)


class MaxPool(torch.autograd.Function):
    """Max pooling of x, for `fit(x)` and `poolable`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: nn.MaxPool2d) -> Tensor:
        side, stride, padding = _window(pool)
        n, channels, height, width = x.shape
        down, across = ((edge + 2 * padding - side) // stride + 1 for edge in (height, width))
        y = x.new_empty(n, channels, down, across).to(memory_format=torch.channels_last)
        ctx.window = [channels // 8, height, width, down, across, side, stride, padding]
        place = torch.empty(y.numel(), dtype=torch.uint8, device=x.device)
        _run("largest", _each(y), [x, n * down * across, *ctx.window, y, place])
        ctx.save_for_backward(place)
        ctx.like = x.shape
        return y

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        dy = gradient[0].contiguous(memory_format=torch.channels_last)
        dx = torch.empty(ctx.like, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
        _run("of_largest", _each(dx), [dy, place, ctx.like[0] * ctx.like[2] * ctx.like[3], *ctx.window, dx])
        return dx, None


def _each(like: Tensor) -> Grid:
    """A thread for each eight channels of a pixel."""
    return (-(-like.numel() // (8 * EACH)), 1, 1), (EACH, 1, 1)


def _window(pool: nn.MaxPool2d) -> tuple[int, int, int]:
    """Side, stride and padding of a square window."""
    side, stride, padding = (_pair(part)[0] for part in (pool.kernel_size, pool.stride, pool.padding))
    return side, stride, padding


def poolable(pool: nn.MaxPool2d) -> bool:
    """Whether `MaxPool` knows such a window: a square one, of a place in a byte."""
    pairs = [_pair(part) for part in (pool.kernel_size, pool.stride, pool.padding)]
    plain = _pair(pool.dilation) == (1, 1) and not (pool.ceil_mode or pool.return_indices)
    return plain and all(down == across for down, across in pairs) and pairs[0][0] <= 15


def normable(norm: nn.BatchNorm2d) -> bool:
    """Whether `BatchNorm` does what the module does: learn scale and offset, and follow the statistics by a share."""
    return norm.affine and norm.track_running_stats and norm.momentum is not None
