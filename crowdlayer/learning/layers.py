"""Layers of recorded steps, for which autograd's own way back takes more kernels, or nothing beside the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .beside import Beside
from .moving import Moving
from .stem import Stem


class Lowered(torch.autograd.Function):
    """Copies of the weights in bfloat16, as autocast makes one by one; back, their gradients in float32.

    The first, `n_first`, are there at once, the others when `beside` has been joined.
    """

    @staticmethod
    def forward(ctx: Any, beside: Beside, moving: Moving | None, n_first: int, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.beside, ctx.moving = beside, moving
        ctx.set_materialize_grads(False)
        copies = tuple(torch.empty_like(weight, dtype=torch.bfloat16) for weight in weights)
        if n_first < len(weights):
            beside.run(lambda: _copied(copies[n_first:], weights[n_first:]))
        _copied(copies[:n_first], weights[:n_first])
        return copies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.moving is not None:
            ctx.beside.run(ctx.moving.move)
            ctx.moving.move_others()
        ctx.beside.join()
        raised = [None if part is None else torch.empty_like(part, dtype=torch.float32) for part in gradients]
        _copied([to for to in raised if to is not None], [part for part in gradients if part is not None])
        return None, None, None, *raised


def _copied(to: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    if to:
        torch._foreach_copy_(list(to), list(tensors))


class Convolution(torch.autograd.Function):
    """A convolution whose weights' gradient is found beside all that waits for its input's, and may move them there."""

    @staticmethod
    def forward(
        ctx: Any, conv: nn.Conv2d, stem: Stem | None, x: Tensor, weight: Tensor, bias: Tensor | None, *beside: Any
    ) -> Tensor:
        """`beside` is where the gradient is found, and what moves the weight by it, or None."""
        ctx.conv, ctx.stem, ctx.has_bias, (ctx.beside, ctx.moving) = conv, stem, bias is not None, beside
        if stem is None:
            ctx.options = (conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups)
        else:
            x, weight = stem.patches(x), stem.weight(weight)
            ctx.options = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        ctx.save_for_backward(x, weight)
        y: Tensor = torch.ops.aten.convolution(x, weight, bias, *ctx.options)
        return y

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy, biases = gradient[0], [len(weight)] if ctx.has_bias else None

        def of(*wanted: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
            found: tuple[Tensor | None, Tensor, Tensor | None] = torch.ops.aten.convolution_backward(
                dy, x, weight, biases, *ctx.options, wanted
            )
            return found

        def of_weight() -> Tensor | None:
            if ctx.moving is not None:
                ctx.moving.move()
            found = of(False, True, False)[1]
            found = found if ctx.stem is None else ctx.stem.gradient(found)
            if ctx.moving is None:
                return found
            ctx.moving.take(ctx.conv.weight, found)
            return None

        # first what others wait for: the other would take the multiprocessors that it wants, and gets what it leaves
        ready = ctx.beside.ready()
        dx, _, dbias = of(ctx.needs_input_grad[2], False, ctx.has_bias)
        dweight = ctx.beside.run(of_weight, dy, x, weight, since=ready)
        return None, None, dx, dweight, dbias, None, None


class Linear(torch.autograd.Function):
    """A linear layer, the same."""

    @staticmethod
    def forward(ctx: Any, linear: nn.Linear, x: Tensor, weight: Tensor, bias: Tensor | None, *beside: Any) -> Tensor:
        """`x` (n, features)."""
        ctx.linear, ctx.has_bias, (ctx.beside, ctx.moving) = linear, bias is not None, beside
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), dy = ctx.saved_tensors, gradient[0]
        ready = ctx.beside.ready()
        dx = dy @ weight if ctx.needs_input_grad[1] else None

        def of_weights() -> tuple[Tensor | None, Tensor | None]:
            if ctx.moving is not None:
                ctx.moving.move()
            found = dy.T @ x, dy.sum(0) if ctx.has_bias else None
            if ctx.moving is None:
                return found
            for weight, gradient in zip(ctx.linear.parameters(), found, strict=False):
                ctx.moving.take(weight, gradient)
            return None, None

        dweight, dbias = ctx.beside.run(of_weights, dy, x, since=ready)
        return None, dx, dweight, dbias, None, None


class Averaged(torch.autograd.Function):
    """The mean of each channel: (n, channels, height, width) → (n, channels, 1, 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        height, width = ctx.shape[2:]
        each: Tensor = (gradient[0] / (height * width)).expand(ctx.shape)
        return each.contiguous(memory_format=torch.channels_last)
