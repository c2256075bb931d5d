"""Our own CUDA kernels against torch's, and recorded steps that run them (make gpu)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from crowdlayer.learning import kernels
from crowdlayer.learning.kernels import BatchNorm, MaxPool, fit
from crowdlayer.learning.recorded import Recorded
from tests.test_gpu import epochs, recorded
from tests.test_trainer import make

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

GPU = torch.device("cuda")


def drawn(*shape: int) -> Tensor:
    """Such numbers as rounding leaves alone, far from 0."""
    return (3 + 2 * torch.randn(*shape, device=GPU)).bfloat16().to(memory_format=torch.channels_last)


def found(ys: Sequence[Tensor], gradient: Tensor, *given: Tensor) -> list[Tensor]:
    """The outputs and the gradients, from a step that has kernels of torch's behind."""
    sum(((k * y) * gradient.to(y.dtype)).sum() for k, y in enumerate(ys, 1)).backward()  # type: ignore[union-attr]
    return [*(y.detach() for y in ys), *(part.grad for part in given if part.grad is not None)]


def apart(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


# n, channels, side: one row more than a block has, columns that fill no warp, more than one tile of them, one pixel
SHAPES = [(3, 8, 7), (16, 64, 8), (5, 24, 7), (64, 64, 32), (7, 512, 4), (3, 2048, 7), (33, 16, 1), (1, 264, 19)]


@pytest.mark.parametrize(("relu", "twice"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_is_as_exact_as_its_numbers_can_be(
    shape: tuple[int, int, int], added: bool, relu: bool, twice: bool
) -> None:
    torch.manual_seed(0)
    n, channels, side = shape
    x, residual, gradient = (drawn(n, channels, side, side) for _ in range(3))
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3).to(GPU)
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
        norm.bias.uniform_(-1, 1)
    exact = copy.deepcopy(norm).double()
    one, other = (part.clone().requires_grad_() for part in (x, residual))
    assert fit(one, other)
    y = BatchNorm.apply(one, other if added else None, norm, relu, twice, norm.weight, norm.bias)
    ours = found(y, gradient, one, other, norm.weight, norm.bias)
    one, other = (part.double().requires_grad_() for part in (x, residual))
    z = exact(one) + other if added else exact(one)
    z = F.relu(z) if relu else z
    theirs = found((z, z) if twice else (z,), gradient, one, other, exact.weight, exact.bias)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert apart(a, b) < (6e-3 if a.dtype == torch.bfloat16 else 1e-3)
    assert apart(norm.running_mean, exact.running_mean) < 1e-6  # type: ignore[arg-type]
    assert apart(norm.running_var, exact.running_var) < 1e-5  # type: ignore[arg-type]


def test_batch_norm_has_the_same_bits_every_time() -> None:
    norm = nn.BatchNorm2d(64).to(GPU)
    x = drawn(64, 64, 32, 32)
    outputs = []
    for _ in range(5):
        norm.zero_grad()
        one = x.clone().requires_grad_()
        y = BatchNorm.apply(one, None, norm, True, False, norm.weight, norm.bias)
        outputs.append(found(y, x, one, norm.weight))
    for again in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], again, strict=True))


def test_what_is_no_number_stays_seen() -> None:
    norm = nn.BatchNorm2d(8).to(GPU)
    x = drawn(4, 8, 4, 4)
    x[0, 3, 0, 0] = torch.nan
    (y,) = BatchNorm.apply(x, None, norm, True, False, norm.weight, norm.bias)
    assert y.isnan().any(dim=(0, 2, 3)).tolist() == [channel == 3 for channel in range(8)]
    assert MaxPool.apply(x, nn.MaxPool2d(3, 2, 1)).isnan().sum() == nn.MaxPool2d(3, 2, 1)(x).isnan().sum() > 0


POOLS = [(2, 2, 0), (3, 2, 1), (3, 2, 0), (3, 1, 1), (5, 3, 2), (2, 3, 0)]


@pytest.mark.parametrize("window", POOLS, ids=str)
@pytest.mark.parametrize("shape", [(3, 8, 7), (2, 64, 16), (5, 24, 13)], ids=str)
def test_max_pooling_is_torchs(shape: tuple[int, int, int], window: tuple[int, int, int]) -> None:
    """Of equals, of which bfloat16 has many, the same one gets the gradient."""
    torch.manual_seed(0)
    n, channels, side = shape
    x = F.relu(drawn(n, channels, side, side) - 3).contiguous(memory_format=torch.channels_last)
    pool = nn.MaxPool2d(*window)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = pool(theirs)
    gradient = torch.randn_like(expected)
    ours, exact = found([MaxPool.apply(mine, pool)], gradient, mine), found([expected], gradient, theirs)
    assert torch.equal(ours[0], exact[0])
    assert apart(ours[1], exact[1]) < 4e-3  # rounded after each window, or once


NETWORKS = ["resnet18", "resnet50", "densenet121", "mobilenet_v2", "efficientnet_b0", "vgg11_bn", "googlenet"]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_as_exact_in_recorded_steps_as_in_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in bfloat16, held against float64."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    more = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    network = models.get_model(name, weights=None, num_classes=5, **more).to(GPU, memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "p") and type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    images = torch.randn(32, 3, 64, 64, device=GPU).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 5, (32,), device=GPU)
    results = []
    for how in ("exact", "single", "recorded"):
        one = copy.deepcopy(network).train()
        run = Recorded(one, torch.device("cuda", 0)) if how == "recorded" else one
        if how == "exact":
            one.double()
        with torch.autocast("cuda", torch.bfloat16, enabled=how != "exact"):
            logits = run(images.double() if how == "exact" else images)
        F.cross_entropy(logits.double(), labels).backward()  # type: ignore[no-untyped-call]
        results.append(
            [
                logits.detach(),
                torch.cat([weight.grad.flatten() for weight in one.parameters() if weight.grad is not None]),
                torch.cat([buffer.double().flatten() for buffer in one.buffers()]),
            ]
        )
    exact, single, ours = results
    for part in range(3):
        assert apart(ours[part], exact[part]) <= 1.2 * apart(single[part], exact[part]) + 1e-6


def test_recorded_steps_learn_in_lower_precision_what_single_kernels_learn() -> None:
    graphs, eager = (epochs(make(compile=how, mixed_precision="bf16"), 3) for how in ("auto", "false"))
    assert recorded(graphs) == 2
    for name, weight in eager.learner.model.state_dict().items():
        torch.testing.assert_close(graphs.learner.model.state_dict()[name], weight, rtol=0.1, atol=0.02)


def test_without_kernels_torchs_do_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "NAMES", ("none",))
    kernels.kernels.cache_clear()
    try:
        assert not fit(drawn(4, 8, 4, 4))
        assert recorded(epochs(make(mixed_precision="bf16"), 3)) == 2
    finally:
        kernels.kernels.cache_clear()
