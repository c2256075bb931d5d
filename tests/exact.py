"""Our kernels held against float64 and torch, on a GPU or emulated on a CPU."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crowdlayer.learning.kernels import BatchNorm, MaxPool, fit


def drawn(device: torch.device, *shape: int) -> Tensor:
    return (3 + 2 * torch.randn(*shape, device=device)).bfloat16().to(memory_format=torch.channels_last)


def apart(ours: Tensor, exact: Tensor) -> float:
    """The distance, as a share of the size."""
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm())


def check_batch_norm(
    device: torch.device, shape: tuple[int, int, int], relu: bool, added: bool, twice: bool, bound: float
) -> None:
    """For n, channels, side: outputs, all gradients, and running statistics; weights' gradients within the bound."""
    torch.manual_seed(0)
    n, channels, side = shape
    x, residual, gradient = (drawn(device, n, channels, side, side) for _ in range(3))
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3).to(device)
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
        norm.bias.uniform_(-1, 1)
        norm.weight[3] = norm.bias[3] = 0  # what is 0 before a ReLU has no gradient
    exact = copy.deepcopy(norm).double()
    one, other = (part.clone().requires_grad_() for part in (x, residual))
    assert fit(one, other)
    ys = BatchNorm.apply(one, other if added else None, norm, relu, twice, norm.weight, norm.bias)
    assert len(ys) == 1 + twice
    sum((k * y * gradient).sum() for k, y in enumerate(ys, 1)).backward()
    x, residual = (part.double().requires_grad_() for part in (x, residual))
    z = exact(x) + residual if added else exact(x)
    z = F.relu(z) if relu else z
    z.backward((3 if twice else 1) * gradient.double())
    assert all(apart(y, z) < 4e-3 for y in ys)
    for ours, theirs in ((one, x), *([(other, residual)] if added else [])):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert apart(ours.grad, theirs.grad) < 6e-3
    for name in ("weight", "bias"):
        assert apart(getattr(norm, name).grad, getattr(exact, name).grad) < bound
    assert apart(norm.running_mean, exact.running_mean) < 1e-6  # type: ignore[arg-type]
    assert apart(norm.running_var, exact.running_var) < bound / 100  # type: ignore[arg-type]


def check_what_is_no_number(device: torch.device) -> None:
    """It stays seen behind a ReLU."""
    norm, x = nn.BatchNorm2d(8).to(device), drawn(device, 4, 8, 4, 4)
    x[0, 3, 0, 0] = torch.nan
    (y,) = BatchNorm.apply(x, None, norm, True, False, norm.weight, norm.bias)
    assert y.isnan().any(dim=3).any(dim=2).any(dim=0).tolist() == [channel == 3 for channel in range(8)]


def check_max_pool(device: torch.device, shape: tuple[int, int, int], window: tuple[int, int, int]) -> None:
    """Of equals, of which bfloat16 has many, the same one gets the gradient; what is no number is the largest."""
    torch.manual_seed(0)
    n, channels, side = shape
    x = F.relu(drawn(device, n, channels, side, side) - 3).contiguous(memory_format=torch.channels_last)
    x[0, 5, 4, 4] = torch.nan
    pool = nn.MaxPool2d(*window)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = MaxPool.apply(mine, pool), pool(theirs)
    gradient = torch.randn_like(expected)
    (1 * y).backward(gradient)
    (1 * expected).backward(gradient)
    assert expected.isnan().any()
    assert torch.equal(y.nan_to_num(99), expected.nan_to_num(99))
    assert mine.grad is not None
    assert theirs.grad is not None
    assert apart(mine.grad, theirs.grad) < 6e-3  # rounded after each window, or once
