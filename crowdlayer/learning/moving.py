"""Weights that move within the backward pass."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim import SGD

from .kernels import laid_out_as, sgd


class Moving:
    """Steps of SGD within a backward pass: of a weight soon after its gradient is there, where that was found.

    It waits until the next gradient is about to be found, which so begins a little later than what goes on beside it:
    who comes first gets the multiprocessors. The optimiser itself moves what has not been taken from it, which alone
    has a gradient when its step comes. A recording of these steps reads the rates from the device.
    """

    def __init__(self, optimizer: SGD, device: torch.device) -> None:
        """`device` is one that has our kernels."""
        self.groups = len(optimizer.param_groups)
        """So many of the optimiser's first groups are moved; `take` is for the first one."""
        self._optimizer = optimizer
        self._own = copy.copy(optimizer)
        self._rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._followed: list[float] = []
        self._taken: list[tuple[nn.Parameter, Tensor]] = []

    def follow(self) -> None:
        """Take over the optimiser's rates, for the next step; one that is recorded cannot look for itself."""
        rates = [float(group["lr"]) for group in self._optimizer.param_groups]
        if rates != self._followed:
            for own, rate in zip(self._rates, rates, strict=True):
                own.fill_(rate)
            self._followed = rates

    def take(self, weight: nn.Parameter, gradient: Tensor) -> None:
        """Move the weight by this gradient, in bfloat16, when `move` is called on the same stream."""
        self._taken.append((weight, gradient))

    def move(self) -> None:
        """Move what has been taken."""
        group = self._optimizer.param_groups[0]
        for weight, gradient in self._taken:
            velocity: Tensor | None = None
            if group["momentum"]:
                state = self._optimizer.state[weight]
                velocity = state.get("momentum_buffer")
                velocity = torch.zeros_like(weight) if velocity is None else laid_out_as(weight, velocity)
                state["momentum_buffer"] = velocity
            with torch.no_grad():
                sgd(weight, velocity, gradient, self._rates[0], group["momentum"], group["weight_decay"])
        self._taken = []

    def forget(self) -> None:
        """Move nothing of what has been taken: the step has failed."""
        self._taken = []

    def move_others(self) -> None:
        """Move all else that has a gradient by now, on the current stream."""
        for group, rate in zip(self._optimizer.param_groups[: self.groups], self._rates, strict=False):
            if given := [weight for weight in group["params"] if weight.grad is not None]:
                self._own.param_groups = [group | {"params": given, "lr": rate}]
                self._own.state = self._optimizer.state  # a checkpoint may have brought another
                self._own.step()
                for weight in given:
                    weight.grad = None
