"""Mixup over answers, one after another in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crowdlayer.data.images import Batch
from crowdlayer.learning.crowd_layer import WORKER_MODELS
from crowdlayer.learning.crowd_model import CrowdLoss
from crowdlayer.learning.mixup import mix, unmixed
from tests.test_crowd_layer import drawn, softmax


def batch() -> Batch:
    """Five tasks of one pixel, of the task's number, with 2, 1, 0, 3 and 1 answers, labelled 10 · task + place."""
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 1, 1)
    task = torch.tensor([0, 0, 1, 3, 3, 3, 4])
    label = 10 * task + torch.tensor([0, 1, 0, 0, 1, 2, 0])
    return Batch(images, task, label + 100, label, 5, 7, 9, 7.0)


def test_an_answer_meets_an_answer_to_the_image_that_its_own_is_mixed_with() -> None:
    met = set()
    for seed in range(50):
        torch.manual_seed(seed)
        mixed = mix(batch(), 1.0)
        assert mixed.weight is not None
        assert mixed.task.tolist() == batch().task.tolist()
        assert mixed.label[0].tolist() == batch().label.tolist()
        assert torch.equal(mixed.worker, mixed.label + 100)
        value = mixed.images[mixed.task, 0, 0, 0]
        others = mixed.label[1] // 10
        expected = mixed.weight * mixed.task + (1 - mixed.weight) * others
        alone = mixed.label[1] == mixed.label[0]  # the other image has no answers, or is the same
        torch.testing.assert_close(value[~alone], expected[~alone])
        met |= {(int(task), int(other)) for task, other in zip(mixed.task, mixed.label[1], strict=True)}
    assert {other for task, other in met if task == 0} == {0, 1, 10, 30, 31, 32, 40}


def test_what_is_shown_is_the_answer_to_the_image_of_which_more_is_seen() -> None:
    mixed = mix(batch(), 0.5)
    assert mixed.weight is not None
    own = mixed.weight >= 0.5
    assert own.any()
    assert not own.all()
    assert torch.equal(mixed.shown[own], mixed.label[0][own])
    assert torch.equal(mixed.shown[~own], mixed.label[1][~own])
    assert torch.equal(unmixed(batch()).shown, batch().label)


def test_the_share_follows_alpha() -> None:
    torch.manual_seed(0)
    for alpha in (0.2, 1.0, 8.0):
        shares = [mixed.weight for mixed in (mix(batch(), alpha) for _ in range(300)) if mixed.weight is not None]
        variance = float(torch.cat(shares).var())
        assert variance == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.2)


def test_the_same_generator_gives_the_same_mixture() -> None:
    torch.manual_seed(3)
    first = mix(batch(), 0.5)
    torch.manual_seed(3)
    again = mix(batch(), 0.5)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.label, again.label)


@pytest.mark.parametrize("name", WORKER_MODELS)
def test_the_loss_is_that_of_the_mixed_matrices_and_answers(name: str) -> None:
    rng = np.random.default_rng(0)
    layer, _ = drawn(name, 3, 4, rng)
    p = softmax(rng.normal(0, 2, (3, 4)))
    own, others, label, label_others = (rng.integers(size, size=3) for size in (3, 3, 4, 4))
    weight = rng.random(3)
    matrices = layer.matrices().detach().numpy()
    expected = 0.0
    for i in range(3):
        scores = p[i] @ (weight[i] * matrices[own[i]] + (1 - weight[i]) * matrices[others[i]])
        h = softmax(scores) if layer.likelihood == "softmax" else scores
        expected -= (weight[i] * np.log(h[label[i]]) + (1 - weight[i]) * np.log(h[label_others[i]])) / 3
    scores_own, scores_others = (layer.scores(torch.from_numpy(p), torch.from_numpy(by)) for by in (own, others))
    share = torch.from_numpy(weight)
    mixed = layer.mixed(scores_own, scores_others, share)
    loss = CrowdLoss()(mixed, torch.from_numpy(label), 3, None, share)
    loss = loss + CrowdLoss()(mixed, torch.from_numpy(label_others), 3, None, 1 - share)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
