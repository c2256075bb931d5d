"""Networks as recorded steps run them: with torch's kernels, and with ours where a C++ compiler can emulate them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from crowdlayer.learning import kernels
from crowdlayer.learning.kernels import poolable
from crowdlayer.learning.recorded import Recorded, recorded
from tests.emulated import Emulated, emulated
from tests.exact import apart, check_batch_norm, check_max_pool, check_what_is_no_number

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


# more rows than a block has; columns that fill no warp; more than one tile of them
SHAPES = [(5, 24, 7), (1, 264, 19), (3, 64, 16)]
HOW = [(False, False, False), (True, True, True), (True, True, False), (True, False, True), (False, True, True)]


@pytest.mark.parametrize(("relu", "added", "twice"), HOW)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("ours")
def test_batch_norm_and_what_follows(shape: tuple[int, int, int], relu: bool, added: bool, twice: bool) -> None:
    check_batch_norm(CPU, shape, relu, added, twice, 1e-4)


@pytest.mark.usefixtures("ours")
def test_what_is_no_number_stays_seen() -> None:
    check_what_is_no_number(CPU)


@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (3, 1, 1), (5, 3, 2)], ids=str)
@pytest.mark.usefixtures("ours")
def test_max_pooling(window: tuple[int, int, int]) -> None:
    check_max_pool(CPU, (2, 24, 9), window)


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
def test_a_whole_network(library: dict[str, Emulated]) -> None:
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
    before = {name: kernel.launches for name, kernel in library.items()}
    run = Recorded(mine, CPU)
    ours = stepped(mine, lambda images: run(images.to(memory_format=torch.channels_last)))
    launches = {name: kernel.launches - before[name] for name, kernel in library.items()}
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in mine.modules())
    assert launches == dict.fromkeys(kernels.NAMES[:4], norms) | dict.fromkeys(kernels.NAMES[4:], 1)
    n = len(list(network.parameters()))
    for first, last in ((0, 1), (1, 1 + n), (1 + n, len(ours))):
        flat, theirs, right = (
            torch.cat([part.double().flatten() for part in parts[first:last]]) for parts in (ours, one, reference)
        )
        assert apart(flat, right) <= 1.2 * apart(theirs, right) + 1e-6


def test_without_torchs_way_to_the_compiler_there_are_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a private one."""
    caplog.set_level("INFO")
    monkeypatch.delattr("torch.cuda._utils._nvrtc_compile")
    assert kernels.kernels.__wrapped__(torch.device("cuda", 0)) is None
    assert "_nvrtc_compile" in caplog.text
