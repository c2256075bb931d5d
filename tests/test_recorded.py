"""Networks as recorded steps run them: with torch's kernels, and with ours where a C++ compiler can emulate them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from crowdlayer.learning import kernels
from crowdlayer.learning.kernels import BatchNorm, MaxPool, poolable
from crowdlayer.learning.recorded import Recorded, recorded
from tests.emulated import Emulated, emulated

CPU = torch.device("cpu")


def stepped(network: nn.Module, run: Callable[[Tensor], Tensor], size: int = 32) -> list[Tensor]:
    """The logits, gradients and buffers of a step under autocast."""
    torch.manual_seed(1)
    images, labels = torch.randn(4, 3, size, size), torch.randint(0, 5, (4,))
    with torch.autocast("cpu", torch.bfloat16):
        logits = run(images)
    F.cross_entropy(logits.float(), labels).backward()  # type: ignore[no-untyped-call]
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    return [logits.detach(), *gradients, *(buffer.clone() for buffer in network.buffers())]


def made(name: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = models.get_model(name, weights=None, num_classes=5, **more)
    return network


NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("resnet18", {}),
    ("shufflenet_v2_x0_5", {}),
    ("mobilenet_v3_small", {}),
    ("efficientnet_b0", {}),
    ("regnet_y_400mf", {}),
    ("squeezenet1_1", {}),
    ("googlenet", {"aux_logits": False, "init_weights": False}),
]


@pytest.mark.parametrize(("name", "more"), NETWORKS, ids=[name for name, _ in NETWORKS])
def test_a_step_has_the_same_bits(name: str, more: dict[str, Any]) -> None:
    """Dropout's draws included; the statistics of batch norm, too."""
    network = made(name, **more)
    other = copy.deepcopy(network)
    run = Recorded(other, CPU)
    assert run._ways
    size = 64 if name == "squeezenet1_1" else 32
    for ours, theirs in zip(stepped(other, run, size), stepped(network, network, size), strict=True):
        assert torch.equal(ours, theirs)


def test_it_is_the_same_weights_that_are_trained() -> None:
    network = made("resnet18")
    run = Recorded(network, CPU)
    before = run(torch.ones(2, 3, 32, 32))
    with torch.no_grad():
        network.get_parameter("fc.bias").add_(1)
    assert torch.allclose(run(torch.ones(2, 3, 32, 32)), before + 1, atol=0.1)


def test_no_step_is_kept_alive() -> None:
    """Its gradients' graph would be of the stream of a trial when the next one is recorded, which ends a recording."""
    network = made("resnet18")

    def accumulates() -> Any:
        weight = network.get_parameter("conv1.weight")
        return weight.expand_as(weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    run = Recorded(network, CPU)
    logits = run(torch.randn(2, 3, 32, 32))
    accumulates().metadata["marked"] = True
    assert accumulates().metadata
    logits.sum().backward()  # type: ignore[no-untyped-call]
    del logits
    assert not accumulates().metadata


class Odd(nn.Module):
    """What must not be taken for a norm with its ReLU, or for a layer of its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.mirrored = nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect")
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.same = nn.Conv2d(8, 8, 3, padding="same", bias=False)
        self.first = nn.Conv2d(3, 8, 1)
        self.norm, self.seen, self.plain = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        y = F.relu(self.seen(self.same(x)), inplace=True)
        x = x + y * x.sigmoid()  # the norm is used three times, so nothing may wait
        x = x + self.plain(self.twice(self.twice(self.mirrored(x))))  # one weight, two gradients
        y = self.seen(2 * x)
        y = y + y  # one norm, and not two
        return self.fc(F.relu(y + x).mean((2, 3)))  # type: ignore[no-any-return]


def test_what_looks_like_it_and_is_not() -> None:
    torch.manual_seed(0)
    network = Odd()
    other = copy.deepcopy(network)
    run = Recorded(other, CPU)
    ways = {str(node.target) for node in run._ways if node.op == "call_module"}
    assert ways == {"first", "same", "norm", "seen", "fc"}
    for ours, theirs in zip(stepped(other, run), stepped(network, network), strict=True):
        assert torch.equal(ours, theirs)


def test_a_network_that_looks_at_its_numbers_is_recorded_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    class Looking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) else -x

    caplog.set_level("INFO")
    assert recorded(Looking(), CPU) is None
    assert "recorded as it is" in caplog.text


# --- our kernels, emulated -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Emulated]:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return emulated(tmp_path_factory.mktemp("kernels"), compiler)


@pytest.fixture
def ours(library: dict[str, Emulated], monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with five multiprocessors that has our kernels."""
    monkeypatch.setattr(kernels, "kernels", lambda _: library)
    monkeypatch.setattr(kernels, "_multiprocessors", lambda _: 5)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def drawn(*shape: int) -> Tensor:
    return (3 + 2 * torch.randn(*shape)).bfloat16().to(memory_format=torch.channels_last)


def apart(ours: Tensor, exact: Tensor) -> float:
    return float((ours.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


# more rows than a block has; columns that fill no warp; more than one tile of them
SHAPES = [(5, 24, 7), (1, 264, 19), (3, 64, 16)]
HOW = [(False, False, False), (True, True, True), (True, True, False), (True, False, True), (False, True, True)]


@pytest.mark.parametrize(("relu", "added", "twice"), HOW)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("ours")
def test_batch_norm_and_what_follows(shape: tuple[int, int, int], relu: bool, added: bool, twice: bool) -> None:
    torch.manual_seed(0)
    n, channels, side = shape
    x, residual, gradient = (drawn(n, channels, side, side) for _ in range(3))
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3)
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
        norm.bias.uniform_(-1, 1)
        norm.weight[3] = norm.bias[3] = 0  # what is 0 before a ReLU has no gradient
    exact = copy.deepcopy(norm).double()
    one, other = (part.clone().requires_grad_() for part in (x, residual))
    ys = BatchNorm.apply(one, other if added else None, norm, relu, twice, norm.weight, norm.bias)
    torch.autograd.backward(ys, [gradient] * len(ys))
    x, residual = (part.double().requires_grad_() for part in (x, residual))
    y = exact(x) + residual if added else exact(x)
    y = F.relu(y) if relu else y
    y.backward(len(ys) * gradient.double())
    assert all(apart(part, y) < 4e-3 for part in ys)
    pairs = [(one.grad, x.grad), *([(other.grad, residual.grad)] if added else [])]
    assert all(apart(a, b) < 6e-3 for a, b in pairs if a is not None and b is not None)
    for name in ("weight", "bias"):
        assert apart(getattr(norm, name).grad, getattr(exact, name).grad) < 1e-4
    assert apart(norm.running_mean, exact.running_mean) < 1e-6  # type: ignore[arg-type]
    assert apart(norm.running_var, exact.running_var) < 1e-6  # type: ignore[arg-type]


@pytest.mark.usefixtures("ours")
def test_what_is_no_number_stays_seen() -> None:
    norm, x = nn.BatchNorm2d(8), drawn(4, 8, 4, 4)
    x[0, 3, 0, 0] = torch.nan
    (y,) = BatchNorm.apply(x, None, norm, True, False, norm.weight, norm.bias)
    assert y.isnan().any(dim=3).any(dim=2).any(dim=0).tolist() == [channel == 3 for channel in range(8)]


@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 3, 2)], ids=str)
@pytest.mark.usefixtures("ours")
def test_max_pooling(window: tuple[int, int, int]) -> None:
    """Of equals, of which there are many, the same one gets the gradient."""
    torch.manual_seed(0)
    x = F.relu(drawn(2, 24, 9, 9) - 3).contiguous(memory_format=torch.channels_last)
    x[0, 5, 4, 4] = torch.nan
    pool = nn.MaxPool2d(*window)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = MaxPool.apply(mine, pool), pool(theirs)
    gradient = torch.randn_like(expected)
    y.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(y.nan_to_num(99), expected.nan_to_num(99))
    assert mine.grad is not None
    assert theirs.grad is not None
    assert apart(mine.grad, theirs.grad) < 6e-3


def test_windows_that_are_torchs_to_pool() -> None:
    assert poolable(nn.MaxPool2d((3, 3), 2, (1, 1)))
    odd: list[dict[str, Any]] = [
        {"ceil_mode": True},
        {"dilation": 2},
        {"return_indices": True},
        {"kernel_size": (2, 3)},
        {"kernel_size": 17},
    ]
    assert not any(poolable(nn.MaxPool2d(**({"kernel_size": 3} | more))) for more in odd)


@pytest.mark.usefixtures("ours")
def test_a_whole_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held against float64, no further from it than torch's own kernels: forks, shortcuts and pooling included."""
    network = made("resnet18").to(memory_format=torch.channels_last)
    for module in network.modules():  # layers of few channels, as each block is 512 threads here
        if isinstance(module, nn.Sequential) and len(module) == 2 and hasattr(module[1], "bn2"):
            del module[1]
    exact, single, mine = (copy.deepcopy(network) for _ in range(3))
    one = stepped(single, lambda images: single(images.to(memory_format=torch.channels_last)))

    def precise(given: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            logits: Tensor = exact(given.double())
        return logits

    reference = stepped(exact.double(), precise)
    used: list[str] = []
    on_cpu = partial(_fit_here, used)
    monkeypatch.setattr("crowdlayer.learning.recorded.fit", on_cpu)
    run = Recorded(mine, CPU)
    ours = stepped(mine, lambda images: run(images.to(memory_format=torch.channels_last)))
    assert len(used) > 10
    n = len(list(network.parameters()))
    for first, last in ((0, 1), (1, 1 + n), (1 + n, len(ours))):
        flat, theirs, right = (
            torch.cat([part.double().flatten() for part in parts[first:last]]) for parts in (ours, one, reference)
        )
        assert apart(flat, right) <= 1.2 * apart(theirs, right) + 1e-6


def _fit_here(used: list[str], *tensors: Tensor) -> bool:
    """`fit`, but for the device."""
    one = tensors[0]
    found = all(t.dtype == torch.bfloat16 and t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
    found = found and one.shape[1] % 8 == 0 and one.shape[1] < one.numel()
    used += ["kernel"] if found else []
    return found
