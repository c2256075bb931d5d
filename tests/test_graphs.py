"""What CUDA graphs are given; what they do is in test_gpu.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from crowdlayer.learning.crowd_layer import WORKER_MODELS
from crowdlayer.learning.graphs import PADDING, TRIALS, Graphs, fill, room
from crowdlayer.learning.mixup import Mixed
from crowdlayer.learning.trainer import Trainer
from tests.test_trainer import make


def gradients(trainer: Trainer, mixed: Mixed) -> list[Tensor]:
    torch.manual_seed(0)
    found = [*trainer.learner._gradients(mixed)]
    return found + [weight.grad.clone() for weight in trainer.learner.model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("name", list(WORKER_MODELS))
@pytest.mark.parametrize("mixup", [0.0, 0.5])
@pytest.mark.parametrize("reduction", ["task", "answer"])
def test_answers_that_are_padding_move_nothing(name: str, mixup: float, reduction: str) -> None:
    trainer = make(crowd_layer=name, mixup=mixup, loss_reduction=reduction)
    batch = next(trainer.train.batches(0))
    mixed = trainer.learner._mixed(batch)
    assert len(batch.task) < 40
    given = room(mixed, 40)
    fill(given, mixed)
    for ours, theirs in zip(gradients(trainer, given), gradients(trainer, mixed), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixup", [0.0, 0.5])
@pytest.mark.parametrize("n", [0, 9])
def test_what_a_step_had_before_is_gone_when_the_next_has_fewer_answers(mixup: float, n: int) -> None:
    trainer = make(mixup=mixup, loss_reduction="answer")
    more, fewer = (trainer.learner._mixed(batch) for batch in list(trainer.train.batches(0))[:2])
    cut = {
        part: getattr(fewer, part)[..., :n]
        for part in ("task", "worker", "label", "weight")
        if mixup or part != "weight"
    }
    fewer = Mixed(**(vars(fewer) | cut | {"n_answers": n}))
    given = room(more, 40)
    fill(given, more)
    fill(given, fewer)
    for ours, theirs in zip(gradients(trainer, given), gradients(trainer, fewer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_steps_of_as_many_and_of_other_numbers_of_answers_follow_each_other() -> None:
    trainer = make(loss_reduction="answer")
    graphs = Graphs(trainer.learner._gradients, trainer.learner._gradients, list(trainer.learner.model.parameters()))
    mixed = trainer.learner._mixed(next(trainer.train.batches(0)))
    fewer = {part: getattr(mixed, part)[..., :9] for part in ("task", "worker", "label")} | {"n_answers": 9}
    for step in (mixed, Mixed(**(vars(mixed) | fewer)), Mixed(**(vars(mixed) | fewer))):
        _, loss = graphs(step, 40, 40.0)
        torch.testing.assert_close(loss, trainer.learner._gradients(step)[1])


def test_without_a_gpu_there_are_none() -> None:
    assert make(compile="auto").learner.graphs is None


def test_no_batch_has_more_answers_than_the_most() -> None:
    loader = make().train
    batches = [batch for epoch in range(5) for batch in loader.batches(epoch)]
    assert max(len(batch.task) for batch in batches) <= batches[0].most_answers
    mean = 5 * len(loader.answers.task) / len(batches)
    assert {(batch.most_answers, batch.mean_answers) for batch in batches} == {(batches[0].most_answers, mean)}


def test_where_room_for_the_most_answers_would_cost_nothing_is_recorded() -> None:
    """Whatever the step, so that none runs without a graph where the graphs of others hold the memory."""
    trainer = make()
    graphs = Graphs(trainer.learner._gradients, trainer.learner._gradients, list(trainer.learner.model.parameters()))
    batch = next(trainer.train.batches(0))
    mixed = trainer.learner._mixed(batch)
    for _ in range(TRIALS + 1):  # here, where there is no GPU, a recording would fail
        graphs(mixed, int(PADDING * batch.mean_answers) + 1, batch.mean_answers)
    for _ in range(TRIALS):
        graphs(mixed, int(PADDING * batch.mean_answers), batch.mean_answers)
    with pytest.raises((AssertionError, RuntimeError), match=r"NVIDIA|CUDA"):
        graphs(mixed, int(PADDING * batch.mean_answers), batch.mean_answers)


class Lacking(torch.nn.Module):
    """Finds no memory in its first evaluations."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.times:
            self.times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x


@pytest.mark.parametrize(("there", "times", "enough"), [(True, 1, True), (True, 2, False), (False, 1, False)])
def test_an_evaluation_that_finds_no_memory_ends_the_graphs_and_tries_again(
    there: bool, times: int, enough: bool
) -> None:
    trainer = make()
    trainer.classifier.features.append(Lacking(times))  # type: ignore[operator, union-attr]
    graphs = Graphs(trainer.learner._gradients, trainer.learner._gradients, list(trainer.learner.model.parameters()))
    trainer.learner.graphs = graphs if there else None
    images = trainer.train.dataset[:]
    if enough:
        assert trainer.predict(images).shape == (33, 3)
    else:
        with pytest.raises(torch.OutOfMemoryError):
            trainer.predict(images)
    assert graphs.give_up() is not there


def test_a_shape_is_tried_before_it_is_recorded() -> None:
    trainer = make()
    graphs = Graphs(trainer.learner._gradients, trainer.learner._gradients, list(trainer.learner.model.parameters()))
    batch = next(trainer.train.batches(0))
    for _ in range(TRIALS):
        logits, _ = graphs(trainer.learner._mixed(batch), batch.most_answers, batch.mean_answers)
        assert len(logits) == len(batch.images)
    assert len(graphs) == 0
