"""FOLDS: labels and workers judged by networks that have not seen the answers."""

from __future__ import annotations

import gc
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from crowdlayer import job
from crowdlayer.answers import Answers
from crowdlayer.data.dataset import CrowdImages, Dataset, LabelledImages
from crowdlayer.data.decoding import Decoded
from crowdlayer.data.held import Held
from crowdlayer.errors import DeviceMemoryError, InterruptedRunError, SettingsError
from crowdlayer.learning import folds
from crowdlayer.learning.experiment import Experiment, Images, Outcome, Phases, checkpoints_size
from crowdlayer.learning.folds import cross_fit, shared_out
from crowdlayer.learning.further import Further
from crowdlayer.learning.inference import Inferred, Predictions, infer
from crowdlayer.learning.spool import Identity, Spool
from crowdlayer.learning.tensors import write_tensors
from crowdlayer.learning.trainer import Trainer, Watch
from crowdlayer.settings import TrainingSettings, load_settings
from crowdlayer.training import _gone_on
from tests.conftest import QUICK, run_job, variables
from tests.crowds import Simulated, simulate, write_shapes
from tests.test_combinations import drawn

SETTINGS = TrainingSettings(
    model="shufflenet_v2_x0_5", img_size=16, small_images="false", n_epochs=2, lr=0.01, batch_size=16, folds=3,
    guard=False, verbose=False,
)  # fmt: skip


def experiment(held_out: bool = False, other: int | None = None, **settings: Any) -> Experiment:
    """30 noisy squares of three colours, two answers each; of fold `other` the answers are others than without it."""
    rng = np.random.default_rng(0)
    truth = np.arange(40) % 3
    pixels = rng.integers(0, 80, (40, 16, 16, 3))
    for image, colour in zip(pixels, truth, strict=True):
        image[..., colour] += 150
    task, label = np.repeat(np.arange(30), 2), rng.integers(3, size=60)
    if other is not None:
        label[shared_out(30, 3, 0)[task] == other] += 1
    names = [str(n) for n in range(40)]
    crowd = CrowdImages(names[:30], names[:30], Answers(30, 4, task, np.arange(60) % 4, label % 3), truth[:30])
    some = np.arange(30)
    train, held = (crowd.subset(some[:24]), crowd.subset(some[24:])) if held_out else (crowd, None)
    val = None if held_out else LabelledImages(names[30:], truth[30:])
    dataset = Dataset("squares", ["red", "green", "blue"], list("abcd"), train, held, val, None)
    squares = torch.from_numpy(pixels.astype(np.uint8))

    def decoded(rows: slice) -> Decoded:
        n = len(squares[rows])
        return Decoded(Held(squares[rows]), torch.arange(n), lambda row: squares[row].numpy(), 1, torch.ones(n))

    parts = (slice(24), slice(24, 30)) if held_out else (slice(30), slice(30, 40))
    images = Images(decoded(parts[0]), decoded(parts[1]), None)
    return Experiment(dataset, images, SETTINGS.model_copy(update=settings), pretrained=False)


def judged(of: Experiment, further: Further | None = None, watch: Watch | None = None) -> Outcome:
    outcome = of.run(of.trainer(), Phases())
    return cross_fit(of, outcome, further or Further(), watch or Watch(), Phases())


def with_workers(dataset: Dataset, n: int) -> Dataset:
    """The same with `n` workers, of whom the first four answer."""
    answers = replace(dataset.train.answers, n_workers=n)
    return replace(dataset, workers=[str(worker) for worker in range(n)], train=replace(dataset.train, answers=answers))


@pytest.fixture(scope="module")
def whole() -> Outcome:
    """What is judged without an interruption."""
    return judged(experiment())


def unseen(outcome: Outcome) -> Tensor:
    assert outcome.predictions.unseen is not None
    return outcome.predictions.unseen


def test_tasks_are_shared_out_evenly_by_the_seed() -> None:
    fold = shared_out(32, 5, 0)
    assert sorted(np.bincount(fold).tolist()) == [6, 6, 6, 7, 7]
    assert (fold == shared_out(32, 5, 0)).all()
    assert (fold != shared_out(32, 5, 1)).any()


@pytest.mark.parametrize("held_out", [False, True])
def test_nobody_is_judged_by_a_network_that_has_seen_the_answers(held_out: bool) -> None:
    """Other answers to the tasks of one fold change what all others are judged by, and nothing of what judges these."""
    before, after = (unseen(judged(experiment(held_out, other))) for other in (None, 1))
    fold = torch.from_numpy(shared_out(len(before), 3, 0))
    mine = torch.from_numpy(shared_out(30, 3, 0)[: len(before)] == 1)  # whose answers are others
    for k in range(3):
        answered_otherwise = bool(mine[fold != k].any())
        assert torch.equal(before[fold == k], after[fold == k]) != answered_otherwise


def test_the_model_and_its_figures_stay_the_runs_own(whole: Outcome) -> None:
    alone = judged(experiment(folds=0))
    assert (alone.folds, whole.folds) == (0, 3)
    assert alone.figures == whole.figures
    assert torch.equal(alone.predictions.train, whole.predictions.train)
    assert torch.equal(alone.confusion, whole.confusion)
    assert not torch.equal(alone.inferred.posterior, whole.inferred.posterior)
    assert whole.inferred.temperature is None


class StopsAt(Watch):
    """Stops at a step of the further trainings, and keeps what a checkpoint would."""

    def __init__(self, further: Further, step: int) -> None:
        self.further, self.left = further, step
        self.state: dict[str, Any] = {}

    def stop(self) -> bool:
        self.left -= 1
        return self.left < 0

    def stopped(self, trainer: Trainer) -> NoReturn:
        self.state = self.further.state_dict() | {"state": trainer.state_dict()}
        raise InterruptedRunError(self.further.under_way)


@pytest.mark.parametrize(("step", "where"), [(1, "fold 1 of 3"), (6, "fold 1 of 3"), (12, "fold 2 of 3")])
def test_interrupted_it_goes_on_to_the_same_bits(step: int, where: str, whole: Outcome) -> None:
    of, further = experiment(), Further()
    watch = StopsAt(further, step)
    with pytest.raises(InterruptedRunError, match=where):
        judged(of, further, watch)
    again = judged(of, Further(**watch.state))
    assert torch.equal(unseen(whole), unseen(again))
    assert torch.equal(whole.inferred.posterior, again.inferred.posterior)


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 60))])
def test_with_any_settings_all_is_finite_and_an_interruption_changes_nothing(seed: int) -> None:
    options = {name: choice for name, choice in drawn(seed).items() if name in TrainingSettings.model_fields}
    of, further = experiment(held_out=not drawn(seed)["with_truth"], **options), Further()
    outcome = judged(of)
    assert outcome.folds == 3
    for figures in (unseen(outcome), outcome.inferred.posterior, *vars(outcome.inferred.workers).values()):
        assert bool(torch.as_tensor(figures).isfinite().all())
    watch = StopsAt(further, random.Random(seed).randrange(12))
    with pytest.raises(InterruptedRunError, match="fold"):
        judged(of, further, watch)
    again = judged(of, Further(**watch.state))
    assert torch.equal(unseen(outcome), unseen(again))


def test_a_checkpoint_of_a_fold_takes_no_more_than_is_left_free_for_it(tmp_path: Path) -> None:
    """Beside the run's own state, after its last epoch; of matrices here, which are larger than the network."""
    of, further = experiment(optimizer="adam"), Further()
    of = replace(of, dataset=with_workers(of.dataset, 400_000))
    trainer, watch = of.trainer(), StopsAt(further, 20)
    outcome = of.run(trainer, Phases())
    with pytest.raises(InterruptedRunError, match="fold 3 of 3"):
        cross_fit(of, outcome, further, watch, Phases())
    write_tensors(trainer.state_dict() | {"further": watch.state}, tmp_path / "checkpoint")
    room, size = checkpoints_size(of.settings, of.dataset) / 3, (tmp_path / "checkpoint").stat().st_size
    alone = checkpoints_size(of.settings.model_copy(update={"folds": 0}), of.dataset) / 3
    assert alone < size < room


def tensor_bytes() -> int:
    """Of all tensors that anybody has, each storage once; what torch traces with, in other tests, has none."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_what_a_run_and_a_fold_go_on_from_is_not_kept_beside_them(tmp_path: Path) -> None:
    """Each has its matrices, the best ones and two moments; of a checkpoint's all but the first are taken over."""
    of, further = experiment(optimizer="adam"), Further()
    of = replace(of, dataset=with_workers(of.dataset, 400_000))
    run, fold = of.trainer(), StopsAt(further, 20)
    with pytest.raises(InterruptedRunError, match="fold 3 of 3"):
        cross_fit(of, of.run(run, Phases()), further, fold, Phases())
    parts = Spool(tmp_path, Identity({}, "")).write(run.state_dict() | {"further": fold.state})
    matrices = run.learner.crowd_layer.matrices().nbytes
    del run, fold, further
    before = tensor_bytes()
    trainer, trainer_of_fold = of.trainer(), of.trainer()
    further = _gone_on(trainer, {name: tmp_path / file for name, (file, _) in parts.items()})
    assert 8 * matrices < tensor_bytes() - before < 9 * matrices  # the fold's own are there already
    further.go_on(trainer_of_fold)
    assert 7 * matrices < tensor_bytes() - before < 8 * matrices


def test_a_fold_that_does_not_fit_into_memory_does_not_cost_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_large(*args: object) -> None:
        raise DeviceMemoryError("out of memory with MODEL=resnet18")

    monkeypatch.setattr(folds, "on_features", too_large)
    outcome = judged(experiment())
    assert (outcome.folds, outcome.predictions.unseen) == (0, None)
    assert "fold 1 of 3: left out: out of memory" in caplog.text


def test_a_frozen_network_sees_an_image_twice() -> None:
    """Once for the features, which the folds share, and once when it is judged."""
    seen: list[int] = []

    def count(module: nn.Module, given: tuple[Tensor], _: Tensor) -> None:
        if isinstance(module, nn.Conv2d) and module.in_channels == 3 and not given[0].is_meta:
            seen.append(len(given[0]))

    of = experiment(freeze=True)
    with register_module_forward_hook(count):
        judged(of)
    assert sum(seen) == 30 + 10 + 30 + 4 * 2  # and each training asks whether the head is last


def run(tasks: Path, **settings: str) -> dict[str, Any]:
    with variables(**(QUICK | {"TASKS": str(tasks), "FOLDS": "2"} | settings)):
        location = job.train(load_settings())
    results: dict[str, Any] = json.loads(Path(location).read_text())
    return results


def test_the_results_say_who_judged_and_every_line_whose_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "crowdlayer")
    results = run(write_shapes(tmp_path / "data"), BASELINES="majority")
    assert (results["folds"], results["posterior_temperature"]) == (2, None)
    assert {"folds", "baseline majority"} < set(results["job"]["seconds"])
    epochs = [record for record in caplog.records if "epoch" in vars(record)]
    whose = [(record.getMessage().partition("epoch")[0], vars(record).get("fold")) for record in epochs]
    of_folds = [(f"fold {name}: ", name) for name in ("1 of 2", "2 of 2") for _ in range(2)]
    assert whose == [("", None)] * 2 + of_folds + [("baseline majority: ", None)] * 2


def test_two_processes_judge_together(shapes: Path, tmp_path: Path) -> None:
    settings = {"TASKS": str(shapes), "OUTPUT": str(tmp_path), "N_PROCESSES": "2", "FOLDS": "2"}
    done = run_job(timeout=300, **QUICK | settings)
    assert done.code == 0, done.stderr
    assert json.loads(Path(done.stdout.strip()).read_text())["folds"] == 2


OUT_OF_MEMORY = """
import os

if os.environ.get("RANK", "none") in os.environ["OUT_OF_MEMORY"]:
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = []

    def step(*_):
        steps.append(_)
        if len(steps) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    register_optimizer_step_post_hook(step)
"""
"""Has those training processes that the variable names run out of it in each step from the sixth on."""


@pytest.mark.parametrize("ranks", [pytest.param("01", marks=pytest.mark.slow), "1"])
def test_of_two_processes_one_alone_cannot_leave_a_fold_out(
    ranks: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other waits for its gradients: whatever it said next would be taken for these."""
    (tmp_path / "sitecustomize.py").write_text(OUT_OF_MEMORY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OUT_OF_MEMORY", ranks)
    settings = {"TASKS": str(shapes), "OUTPUT": str(tmp_path / "out"), "N_PROCESSES": "2", "FOLDS": "2"}
    done = run_job(timeout=300, **QUICK | settings | {"BASELINES": "majority", "TIMEOUT": "120"})
    said = (
        "out of memory with MODEL=shufflenet_v2_x0_5, BATCH_SIZE=16 and IMG_SIZE=16: lower one of them; 2.00 GiB more"
    )
    if ranks == "01":
        assert done.code == 0, done.stderr
        assert f"fold 1 of 2: left out: {said}" in done.stderr
        results = json.loads(Path(done.stdout.strip()).read_text())
        assert (results["folds"], results["baselines"]) == (0, {"majority": None})
    else:
        assert done.code == 71, done.stderr
        assert done.last_line.startswith(f"crowdlayer: fold 1 of 2: {said}")
        assert done.last_line.endswith("; so it is on some processes only")


def test_there_must_be_a_task_for_each_fold(tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "data", n_train=9)
    with pytest.raises(SettingsError, match="FOLDS: must be at most 9, the tasks trained on, got 10"):
        run(data, FOLDS="10")


def made(crowd: Simulated, predictions: Predictions) -> Inferred:
    """What is inferred of a simulated crowd, with true labels for a temperature of 1."""
    n, n_classes = crowd.logits.shape
    names, classes = [str(task) for task in range(n)], [str(label) for label in range(n_classes)]
    workers = [str(worker) for worker in range(crowd.answers.n_workers)]
    train = CrowdImages(names, names, crowd.answers, crowd.truth)
    dataset = Dataset("made up", classes, workers, train, None, LabelledImages(names, crowd.truth), None)
    return infer(dataset, predictions, torch.eye(n_classes).repeat(len(workers), 1, 1).log_softmax(2))[1]


@pytest.mark.parametrize("per_task", [1, 2])
def test_with_networks_that_have_not_seen_the_answers_intervals_cover_and_scores_are_shares(per_task: int) -> None:
    """Few answers a task: one that has learnt them by heart is sure of all of them."""
    crowd = simulate(3, n_classes=5, n_tasks=3000, per_task=per_task)
    truth, answers = torch.from_numpy(crowd.truth), crowd.answers
    by_heart = torch.zeros_like(crowd.logits)
    by_heart.index_put_((torch.from_numpy(answers.task), torch.from_numpy(answers.label)), torch.tensor(8.0).double())
    right = torch.from_numpy(answers.label == crowd.truth[answers.task])
    share = torch.stack([right[torch.from_numpy(answers.worker == worker)].double().mean() for worker in range(30)])

    def of(predictions: Predictions) -> tuple[float, float, float]:
        """How far the scores are above the share of labels that are right; that share; the intervals that hold."""
        found = made(crowd, predictions)
        correct = (found.labels.label == truth).double().mean()
        holds = (found.workers.low <= share) & (share <= found.workers.high)
        return float(found.labels.score.mean() - correct), float(correct), float(holds.double().mean())

    known, unknown = (
        of(Predictions(by_heart, crowd.logits, None)),
        of(Predictions(by_heart, crowd.logits, None, crowd.logits)),
    )
    assert known[0] > 0.1
    assert abs(unknown[0]) < 0.02
    assert unknown[1] > known[1] + 0.05
    assert known[2] < 0.5 <= 0.9 <= unknown[2]
