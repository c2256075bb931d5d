"""Our kernels held against float64 and torch, on a GPU or emulated on a CPU."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crowdlayer.data.pixels import normalise
from crowdlayer.learning.crowd_layer import CrowdLayer
from crowdlayer.learning.crowd_model import IGNORED, CrowdLoss
from crowdlayer.learning.kernels import BatchNorm, MaxPool, crowd_loss, fit
from crowdlayer.learning.moving import Moving
from crowdlayer.learning.stem import WHOLE, Stem


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


def check_max_pool(
    device: torch.device, shape: tuple[int, int, int], window: tuple[int, int, int], twice: bool
) -> None:
    """Of equals, of which bfloat16 has many, the same one gets the gradient; what is no number is the largest."""
    torch.manual_seed(0)
    n, channels, side = shape
    x = F.relu(drawn(device, n, channels, side, side) - 3).contiguous(memory_format=torch.channels_last)
    x[0, 5, 4, 4] = torch.nan
    pool = nn.MaxPool2d(*window)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ys, expected = MaxPool.apply(mine, pool, twice), pool(theirs)
    gradient = torch.randn_like(expected)
    assert len(ys) == 1 + twice
    sum((k * y * gradient).sum() for k, y in enumerate(ys, 1)).backward()
    (1 * expected).backward((3 if twice else 1) * gradient)
    assert expected.isnan().any()
    assert all(torch.equal(y.nan_to_num(99), expected.nan_to_num(99)) for y in ys)
    assert mine.grad is not None
    assert theirs.grad is not None
    assert apart(mine.grad, theirs.grad) < (6e-3 if twice else 4e-3)  # rounded after each window, or once


def check_stem(device: torch.device, conv: nn.Conv2d, size: tuple[int, int], is_bytes: bool) -> None:
    """The images' patches under the weights' are the images under the weights, and so are the gradients."""
    torch.manual_seed(0)
    conv = conv.to(device).to(memory_format=torch.channels_last)
    lower = conv.weight.detach().bfloat16()
    conv.weight.data = lower.float()
    pixels = torch.randint(0, 256, (3, *size, 3), dtype=torch.uint8, device=device)
    images, stem = normalise(pixels, device), Stem(conv)
    patches = stem.patches(pixels if is_bytes else images)
    exact = copy.deepcopy(conv).double()
    wanted = exact(images.bfloat16().double())
    weight = stem.weight(lower).double().requires_grad_()
    y = F.conv2d(patches.double(), weight, None if conv.bias is None else conv.bias.double())
    assert patches.shape[1] % 8 == 0
    if patches.shape[1] == WHOLE:
        assert not patches[:, conv.weight[0].numel() :].any()  # what fills it up
    assert patches.is_contiguous(memory_format=torch.channels_last)
    assert y.shape == wanted.shape
    assert apart(y, wanted) < 1e-3 if is_bytes else torch.allclose(y, wanted)  # of bytes few are rounded otherwise
    gradient = torch.randn_like(wanted)
    ((y + wanted) * gradient).sum().backward()
    assert weight.grad is not None
    assert exact.weight.grad is not None
    ours = stem.gradient(weight.grad.bfloat16())
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert apart(ours, exact.weight.grad.bfloat16()) < 1e-3


def check_crowd_loss(device: torch.device, n_classes: int, by_answers: bool) -> None:
    """Tasks without answers, and answers that are none, too; a worker without answers has a gradient of 0."""
    torch.manual_seed(0)
    layer = CrowdLayer(7, n_classes)
    layer.confusion.data += torch.randn_like(layer.confusion)
    task = torch.cat([torch.arange(13).repeat_interleave(4), torch.zeros(11, dtype=torch.int64)]).to(device)
    task[task == 5] = 6
    worker, label = torch.randint(0, 6, (len(task),)).to(device), torch.randint(0, n_classes, (len(task),)).to(device)
    label[-11:] = IGNORED
    logits = (3 * torch.randn(13, n_classes)).bfloat16().to(device)
    n = torch.tensor(52.0, device=device) if by_answers else 13
    found = []
    for dtype in (torch.float64, torch.float32):
        there = copy.deepcopy(layer).to(device, dtype)
        given = logits.to(logits.dtype if dtype == torch.float32 else dtype).requires_grad_()
        if dtype == torch.float32:
            loss = crowd_loss(given, there.confusion, task, worker, label, n)
        else:
            loss = CrowdLoss("answer" if by_answers else "task")(there(given, task, worker), label, 13, n)
        (2 * loss).backward()  # type: ignore[no-untyped-call]
        assert there.confusion.grad is not None
        assert given.grad is not None
        found.append((loss, given.grad, there.confusion.grad))
    (exact, exact_z, exact_w), (ours, ours_z, ours_w) = found
    assert apart(ours, exact) < 1e-5
    assert apart(ours_z, exact_z) < 3e-3  # in bfloat16
    assert apart(ours_w, exact_w) < 1e-5
    assert torch.equal(ours_w[6], torch.zeros_like(ours_w[6]))


def check_sgd(device: torch.device, momentum: float) -> None:
    """Of gradients in either order, from the first step on, at rates that change, with a velocity as it was saved."""
    torch.manual_seed(0)
    shape, orders = (130, 9, 3, 3), (torch.channels_last, torch.contiguous_format)
    start = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    weights = [nn.Parameter(start.clone()) for _ in orders]
    sgds = [torch.optim.SGD([weight], lr=1.0, momentum=momentum, weight_decay=0.1) for weight in weights]
    moving = Moving(sgds[1], device)
    for rate, order in zip((0.1, 0.1, 0.05, 0.02), (*orders, *orders), strict=True):
        gradient = torch.randn(shape, device=device).bfloat16().to(memory_format=order)
        weights[0].grad = gradient.float()
        for one in sgds:
            one.param_groups[0]["lr"] = rate
        sgds[0].step()
        moving.follow()
        moving.take(weights[1], gradient)
        moving.move()
        if momentum:
            state = sgds[1].state[weights[1]]
            assert apart(state["momentum_buffer"], sgds[0].state[weights[0]]["momentum_buffer"]) < 1e-6
            state["momentum_buffer"] = state["momentum_buffer"].contiguous()
        assert apart(weights[1], weights[0]) < 1e-6
    assert apart(weights[1], start) > 0.01
