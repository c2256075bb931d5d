"""Our own CUDA kernels against torch's, and recorded steps that run them (make gpu)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision import models

from crowdlayer.learning.kernels import BatchNorm, fit, making
from crowdlayer.learning.recorded import Recorded
from tests.exact import (
    apart,
    check_batch_norm,
    check_crowd_loss,
    check_max_pool,
    check_sgd,
    check_stem,
    check_what_is_no_number,
    drawn,
)
from tests.test_gpu import epochs, recorded
from tests.test_trainer import make

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

GPU = torch.device("cuda")


# n, channels, side: one row more than a block has, columns that fill no warp, more than one tile of them, one pixel
SHAPES = [(3, 8, 7), (16, 64, 8), (5, 24, 7), (64, 64, 32), (7, 512, 4), (3, 2048, 7), (33, 16, 1), (1, 264, 19)]


@pytest.mark.parametrize(("relu", "twice"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_is_as_exact_as_its_numbers_can_be(
    shape: tuple[int, int, int], added: bool, relu: bool, twice: bool
) -> None:
    check_batch_norm(GPU, shape, relu, added, twice, 1e-3)


def test_batch_norm_has_the_same_bits_every_time() -> None:
    norm = nn.BatchNorm2d(64).to(GPU)
    x = drawn(GPU, 64, 64, 32, 32)
    outputs = []
    for _ in range(5):
        norm.zero_grad()
        one = x.clone().requires_grad_()
        (y,) = BatchNorm.apply(one, None, norm, True, False, norm.weight, norm.bias)
        (y * x).sum().backward()
        assert one.grad is not None
        assert norm.weight.grad is not None
        outputs.append([y.detach(), one.grad, norm.weight.grad])
    for again in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], again, strict=True))


def test_what_is_no_number_stays_seen() -> None:
    check_what_is_no_number(GPU)


POOLS = [(2, 2, 0), (3, 2, 1), (3, 2, 0), (3, 1, 1), (5, 3, 2), (2, 3, 0)]


@pytest.mark.parametrize("window", POOLS, ids=str)
@pytest.mark.parametrize("shape", [(3, 8, 7), (2, 64, 16), (5, 24, 13)], ids=str)
@pytest.mark.parametrize("twice", [False, True])
def test_max_pooling_is_torchs(shape: tuple[int, int, int], window: tuple[int, int, int], twice: bool) -> None:
    check_max_pool(GPU, shape, window, twice)


@pytest.mark.parametrize("by_answers", [False, True])
@pytest.mark.parametrize("n_classes", [2, 10, 32, 100, 128])
def test_the_crowd_layer_and_its_loss(n_classes: int, by_answers: bool) -> None:
    check_crowd_loss(GPU, n_classes, by_answers)


@pytest.mark.parametrize("is_bytes", [True, False])
@pytest.mark.parametrize("window", [(7, 2, 3), (3, 2, 1), (3, 1, 1), (5, 2, 1)], ids=str)
def test_patches_under_other_weights_are_images_under_theirs(window: tuple[int, int, int], is_bytes: bool) -> None:
    check_stem(GPU, nn.Conv2d(3, 16, *window), (33, 50), is_bytes)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_sgd_is_torchs(momentum: float) -> None:
    check_sgd(GPU, momentum)


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


WAYS: list[dict[str, Any]] = [
    {}, {"crowd_warmup": 2}, {"momentum": 0.0, "decay": 0.0}, {"lr_crowd": 0.3}, {"optimizer": "adam", "lr": 1e-4},
]  # fmt: skip


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_recorded_steps_learn_in_lower_precision_what_single_kernels_learn(options: dict[str, Any]) -> None:
    graphs, eager = (epochs(make(compile=how, mixed_precision="bf16", **options), 5) for how in ("auto", "false"))
    assert recorded(graphs) == 2
    for name, weight in eager.learner.model.state_dict().items():
        torch.testing.assert_close(graphs.learner.model.state_dict()[name], weight, rtol=0.1, atol=0.02)


def test_without_kernels_torchs_do_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "source", lambda: "no code")
    making.kernels.cache_clear()
    try:
        assert not fit(drawn(GPU, 4, 8, 4, 4))
        assert recorded(epochs(make(mixed_precision="bf16"), 3)) == 2
    finally:
        making.kernels.cache_clear()
