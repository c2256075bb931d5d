"""Optimisers that move only the rows that a step has to do with, and what processes tell each other of such rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..machine.processes import Processes


class RowWise(Optimizer):
    """An optimiser for which parameters with sparse gradients wait, row by row, until a gradient comes.

    Momenta and moments of a row that waits do not fade, nor move it; so its steps are not those of the dense optimiser,
    but of torch's SparseAdam. Weight decay does not reach such parameters.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move the rows, then all else as the optimiser does."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    gradient = parameter.grad.coalesce()
                    self.move(parameter, group, gradient.indices()[0], gradient.values())
                    parameter.grad = None
        return super().step(closure)

    def move(self, table: Tensor, group: dict[str, Any], row: Tensor, gradient: Tensor) -> None:
        """Move `table[row]`, whose rows differ, by their `gradient`."""
        raise NotImplementedError


class RowWiseSGD(RowWise, SGD):
    """SGD."""

    def move(self, table: Tensor, group: dict[str, Any], row: Tensor, gradient: Tensor) -> None:
        if group["momentum"] > 0:
            state = self.state[table]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(table)
            gradient = state["momentum_buffer"][row].mul_(group["momentum"]).add_(gradient)
            state["momentum_buffer"][row] = gradient
        table.index_add_(0, row, gradient, alpha=-group["lr"])


class RowWiseAdam(RowWise, Adam):
    """Adam."""

    def move(self, table: Tensor, group: dict[str, Any], row: Tensor, gradient: Tensor) -> None:
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
        state["step"] += 1
        first, second = group["betas"]
        mean = state["exp_avg"][row].lerp_(gradient, 1 - first)
        square = state["exp_avg_sq"][row].lerp_(gradient.square(), 1 - second)
        state["exp_avg"][row], state["exp_avg_sq"][row] = mean, square
        n = float(state["step"])
        move = (mean / (1 - first**n)) / ((square / (1 - second**n)).sqrt() + group["eps"])
        table.index_add_(0, row, move, alpha=-group["lr"])


class RowWiseAdamW(RowWiseAdam, AdamW):
    """AdamW."""


def share_rows(module: nn.Module, processes: Processes) -> None:
    """Give every process the mean over processes of the sparse gradients, which DDP does not do."""
    if processes.count == 1:
        return
    for parameter in module.parameters():
        gradient = parameter.grad
        assert gradient is not None  # the layer has a part in every loss
        row, values = (processes.gather(part) for part in (gradient._indices()[0], gradient._values()))
        row, values = row.to(gradient.device), values.to(gradient.device)
        parameter.grad = torch.sparse_coo_tensor(
            row.unsqueeze(0), values / processes.count, gradient.shape, check_invariants=False
        )
