"""Networks as recorded steps run them: with torch's kernels, and with ours where a C++ compiler can emulate them."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision import models

from crowdlayer.learning.branches import branch_to
from crowdlayer.learning.graphs import Graphs
from crowdlayer.learning.kernels import batch_norm, making, poolable
from crowdlayer.learning.mixup import unmixed
from crowdlayer.learning.moving import Moving
from crowdlayer.learning.recorded import Recorded, recorded
from crowdlayer.learning.rows import RowWiseSGD
from crowdlayer.learning.stem import stemmed
from tests.emulated import Emulated, emulated
from tests.exact import (
    apart,
    check_batch_norm,
    check_crowd_loss,
    check_max_pool,
    check_sgd,
    check_stem,
    check_what_is_no_number,
)
from tests.test_trainer import make

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


@pytest.mark.parametrize(("name", "n"), [("resnet18", 3), ("regnet_y_400mf", 4), ("mobilenet_v2", 0)])
def test_branches_are_convolutions_on_shortcuts(name: str, n: int) -> None:
    network = made(name)
    graph = fx.Tracer().trace(network)
    modules = {node: network.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    branches = [branch for node in graph.nodes if (branch := branch_to(node, modules))]
    assert len(branches) == n
    for branch in branches:
        assert [type(modules[node]) for node in branch] == [nn.Conv2d, nn.BatchNorm2d]
        assert "downsample" in str(branch[0].target) or "proj" in str(branch[0].target)


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
    monkeypatch.setattr(making, "kernels", lambda _: library)
    monkeypatch.setattr(batch_norm, "multiprocessors", lambda _: 5)


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
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.usefixtures("ours")
def test_max_pooling(window: tuple[int, int, int], twice: bool) -> None:
    check_max_pool(CPU, (2, 24, 9), window, twice)


@pytest.mark.parametrize("by_answers", [False, True])
@pytest.mark.parametrize("n_classes", [3, 32, 70])
@pytest.mark.usefixtures("ours")
def test_the_crowd_layer_and_its_loss(n_classes: int, by_answers: bool) -> None:
    check_crowd_loss(CPU, n_classes, by_answers)


STEMS = [(7, 2, 3), (3, 2, 1), (3, 1, 1), (3, 2, 0), (5, 2, 2), (4, 2, 0), (5, 2, 1), (11, 2, 2), (1, 1, 0)]
"""Side, stride and padding."""


@pytest.mark.parametrize("is_bytes", [True, False])
@pytest.mark.parametrize(("side", "stride", "padding"), STEMS)
@pytest.mark.usefixtures("ours")
def test_patches_under_other_weights_are_images_under_theirs(
    side: int, stride: int, padding: int, is_bytes: bool
) -> None:
    conv = nn.Conv2d(3, 8, side, stride, padding, bias=stride == 1)
    assert stemmed(conv)
    check_stem(CPU, conv, (13, 18), is_bytes)


def test_stems_that_stay_as_they_are() -> None:
    odd: list[dict[str, Any]] = [
        {"in_channels": 4}, {"kernel_size": (3, 5)}, {"kernel_size": 7}, {"kernel_size": 16, "stride": 16},
        {"padding": "same"}, {"dilation": 2}, {"in_channels": 6, "groups": 2},
    ]  # fmt: skip
    usual: dict[str, Any] = {"in_channels": 3, "out_channels": 8, "kernel_size": 3}
    assert stemmed(nn.Conv2d(**usual))
    assert not any(stemmed(nn.Conv2d(**usual | more)) for more in odd)


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
    once = dict.fromkeys(("largest", "of_largest", "patches_of_floats"), 1)
    norm = dict.fromkeys(("distances", "normalise", "products", "gradient"), norms)
    assert {name: n for name, n in launches.items() if n} == norm | once | {"taken": 2}
    n = len(list(network.parameters()))
    for first, last in ((0, 1), (1, 1 + n), (1 + n, len(ours))):
        flat, theirs, right = (
            torch.cat([part.double().flatten() for part in parts[first:last]]) for parts in (ours, one, reference)
        )
        assert apart(flat, right) <= 1.2 * apart(theirs, right) + 1e-6


@pytest.mark.parametrize("reduction", ["task", "answer"])
@pytest.mark.usefixtures("ours")
def test_a_step_as_it_is_recorded(
    library: dict[str, Emulated], reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From bytes to the gradients of the workers' matrices."""
    trainer = make(mixed_precision="bf16", loss_reduction=reduction)
    learner, before = trainer.learner, {name: kernel.launches for name, kernel in library.items()}
    batch = next(iter(trainer.train))
    learner.train()
    network, autocast = learner._network, []
    assert network is not None

    def watched(images: Tensor) -> Tensor:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return network(images)

    monkeypatch.setitem(vars(learner), "_network", watched)
    found = []
    for step in (learner._gradients, learner._recorded):
        logits, loss = step(unmixed(batch))
        gradients = [weight.grad for weight in learner.model.parameters()]
        found.append((logits, loss, torch.cat([part.flatten() for part in gradients if part is not None])))
    for theirs, ours in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert apart(ours, theirs) < 0.02
    assert autocast == [True]
    launched = {name for name, kernel in library.items() if kernel.launches > before[name]}
    assert launched >= {"patches_of_bytes", "answered", "of_answered", "taken"}


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.usefixtures("ours")
def test_sgd_is_torchs(momentum: float) -> None:
    check_sgd(CPU, momentum)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.usefixtures("ours")
def test_weights_are_moved_on_the_way_as_they_would_be_afterwards(
    momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At rates that change, from a checkpoint in between; by the optimiser itself where nothing moves them.

    And the group that is held back for a while.
    """
    for other in ("available", "fit"):  # all else to the bit
        monkeypatch.setattr(f"crowdlayer.learning.recorded.{other}", lambda *_: False)
    rates, networks = (0.01, 0.005, 0.005, 0.002), [made("shufflenet_v2_x0_5"), made("shufflenet_v2_x0_5")]
    optimizers = []
    for network in networks:
        for stage in (network.stage2, network.stage3, network.stage4):  # one block of each kind is enough to emulate
            del stage[2:]  # type: ignore[operator, union-attr]
        named = dict(network.named_parameters())
        last = [named.pop("conv1.1.weight")]
        groups = [{"params": [*named.values()], "weight_decay": 5e-4}, {"params": last, "weight_decay": 0.0}]
        optimizers.append(RowWiseSGD(groups, lr=1.0, momentum=momentum, fused=True))
    moving = Moving(optimizers[1], CPU)
    runs: list[Callable[[Tensor], Tensor]] = [networks[0], Recorded(networks[1], CPU, moving)]
    for i, rate in enumerate(rates):
        moving.groups = 1 if i == 0 else 2
        for network, optimizer, run in zip(networks, optimizers, runs, strict=True):
            optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, 3 * rate
            moving.follow()
            optimizer.zero_grad()
            stepped(network, network if i == 2 else run)
            left = [name for name, weight in network.named_parameters() if weight.grad is not None]
            if run is runs[1] and i != 2:
                assert left == (["conv1.1.weight"] if i == 0 else [])
            else:
                assert len(left) == len(list(network.parameters()))
            optimizer.step()
        optimizers[1].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    for theirs, ours in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("ours")
def test_a_crowd_layer_that_is_held_back_is_not_moved_on_the_way() -> None:
    """And what was recorded meanwhile is not gone on with, when it is let go."""
    trainer = make(mixed_precision="bf16")
    learner, batch = trainer.learner, next(trainer.train.batches(0))
    assert isinstance(learner.optimizer, RowWiseSGD)
    learner._moving = Moving(learner.optimizer, CPU)
    learner.graphs = Graphs(learner._recorded, learner._gradients, list(learner.model.parameters()))
    learner.train()
    trials = []
    for held in (True, True, False):
        before = {name: weight.detach().clone() for name, weight in learner.model.named_parameters()}
        learner.step(batch, held)
        moved = {name for name, weight in learner.model.named_parameters() if not torch.equal(weight, before[name])}
        assert ("crowd_layer.confusion" in moved) is not held
        assert any(name.startswith("classifier.") for name in moved)
        trials += [recording.trials for recording in learner.graphs._recordings.values()]
    assert trials == [1, 2, 1]


def test_without_torchs_way_to_the_compiler_there_are_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is a private one."""
    caplog.set_level("INFO")
    monkeypatch.delattr("torch.cuda._utils._nvrtc_compile")
    assert making.kernels.__wrapped__(torch.device("cuda", 0)) is None
    assert "_nvrtc_compile" in caplog.text
