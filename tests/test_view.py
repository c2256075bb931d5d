"""What a report shows of a run: as much as a page holds, and nobody called a spammer who is none."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from crowdlayer.answers import Answers
from crowdlayer.data.dataset import CrowdImages, Dataset, LabelledImages
from crowdlayer.data.decoding import Decoded
from crowdlayer.data.held import Held
from crowdlayer.learning.experiment import Images, Outcome
from crowdlayer.learning.inference import Predictions, infer
from crowdlayer.learning.progress import Best, History
from crowdlayer.report import html
from crowdlayer.report.results import Finished, Provenance, document
from crowdlayer.report.view import MOST_REVIEWED, MOST_WORKERS, THUMBNAIL, _histogram, view
from tests.crowds import Crowd, Simulated, simulate


def made_up(crowd: Simulated, n_held: int = 0) -> tuple[Dataset, Outcome, Images]:
    """A finished run on a simulated crowd, with names as long as they come; without val/ where tasks are held out."""
    n_tasks, (n_workers, n_classes, _) = len(crowd.truth), crowd.confusion.shape
    rng = np.random.default_rng(0)
    names = [f"train/class/an image with a rather long name {task}.jpg" for task in range(n_tasks)]
    tasks = [str(task) for task in range(n_tasks)]
    n_train = n_tasks - n_held
    train, held = (
        CrowdImages(names[part], tasks[part], crowd.answers.of_tasks(np.arange(n_tasks)[part]), crowd.truth[part])
        for part in (slice(n_train), slice(n_train, None))
    )
    labels = rng.integers(n_classes, size=200)
    other = LabelledImages([f"{i}.png" for i in range(200)], labels)
    workers = [f"worker-{rng.bytes(12).hex()}" for _ in range(n_workers)]
    classes = [f"class number {i}" for i in range(n_classes)]
    held_out, val = (held, None) if n_held else (None, other)
    dataset = Dataset("made up", classes, workers, train, held_out, val, other)
    logits = torch.from_numpy(rng.standard_normal((200, n_classes)))
    predictions = Predictions(crowd.logits[:n_train], crowd.logits[n_train:] if n_held else logits, logits)
    likelihood = torch.eye(n_classes).repeat(n_workers, 1, 1).log_softmax(2)
    temperature, inferred = infer(dataset, predictions, likelihood)
    history = History([1.0] * 100, [2.0] * 100, [50.0] * 100, [0.1] * 100, [1.0] * 100, [{}] * 100)
    figures = {"temperature": temperature}
    outcome = Outcome(history, Best(1, 1.0, {}, {}, {}), likelihood, figures, predictions, inferred, "matrix", None)
    noise = torch.from_numpy(rng.integers(0, 2, (64, THUMBNAIL, THUMBNAIL, 3), dtype=np.uint8) * 255)
    train_images, chosen_on, test_images = (  # noise of black and white is the largest JPEG that a thumbnail can be
        Decoded(Held(noise), torch.arange(n) % 64, lambda row: noise[row].numpy(), 1, torch.ones(n))
        for n in (n_train, n_held or 200, 200)
    )
    return dataset, outcome, Images(train_images, chosen_on, test_images)


def viewed(dataset: Dataset, outcome: Outcome, images: Images) -> dict[str, Any]:
    """What the report of it shows."""
    settings = {"output_name": "big", "seed": 0, "model": "resnet18", "select_by": "loss", "img_size": THUMBNAIL}
    results = document(Finished(dataset, images, outcome, Provenance(settings, "0" * 64, ["cpu"], False)), {})
    return view(dataset, outcome, images, results)


@pytest.mark.parametrize(
    ("n_tasks", "n_workers", "n_classes", "megabytes"),
    [(2000, 60, 10, 1.5), (100_000, 12_000, 10, 5.0), (2000, 50, 200, 5.0)],
)
def test_the_page_stays_a_page(n_tasks: int, n_workers: int, n_classes: int, megabytes: float) -> None:
    crowd = simulate(0, n_classes=n_classes, n_tasks=n_tasks, n_workers=n_workers, per_task=3)
    dataset, outcome, images = made_up(crowd)
    shown = json.loads(json.dumps(viewed(dataset, outcome, images)))
    assert len(html.page(shown).encode()) < megabytes * 1e6
    assert min(len(task["thumbnail"]) for task in shown["review"]) > 10_000
    assert len(shown["review"]) == MOST_REVIEWED
    assert len(shown["workers"]) == min(n_workers, MOST_WORKERS)
    found = outcome.inferred.workers
    assert {dataset.workers[int(at)] for at in (found.order[0], found.n.argmax())} <= {
        row[0] for row in shown["workers"]
    }


def test_an_image_to_look_at_again_says_whom_the_label_is_of() -> None:
    """Of tasks trained on and held out: where the majority or the classifier alone says another, it is named."""
    crowd = simulate(0, n_classes=5, n_tasks=60, n_workers=20, per_task=3, signal=1.0)
    dataset, outcome, images = made_up(crowd, n_held=20)
    shown = json.loads(json.dumps(viewed(dataset, outcome, images)))
    alone, majority = crowd.logits.argmax(1), outcome.inferred.majority
    order = [int(item["task"]) for item in shown["review"]]
    assert min(order) < 40 <= max(order)
    assert [item["classifier"] for item in shown["review"]] == alone[order].tolist()
    page, label = html.page(shown), outcome.inferred.labels.label[order]
    for said, whose in ((alone[order], "classifier alone: "), (majority[order], "majority: ")):
        assert page.count(whose) == (said != label).sum() > 0


@pytest.mark.parametrize(("n_classes", "right"), [(2, 0.6), (10, 0.2), (10, 0.3)])
def test_honest_work_that_is_seldom_right_is_not_called_spam(n_classes: int, right: float) -> None:
    """Five a task who are right more often than chance, and else anything; of twenty workers two answer at random."""
    rng = np.random.default_rng(0)
    truth = rng.integers(n_classes, size=3000)
    eye = np.eye(n_classes)
    confusion = np.stack([right * eye + (1 - right) / (n_classes - 1) * (1 - eye)] * 18 + [0 * eye + 1 / n_classes] * 2)
    votes = Crowd(confusion).answers(truth, 5, rng)
    given = [(task, int(worker), label) for task, vote in enumerate(votes) for worker, label in vote.items()]
    answers = Answers(3000, 20, *np.array(given).T.copy())
    logits = rng.standard_normal((3000, n_classes))
    logits[np.arange(3000), truth] += 6
    dataset, outcome, images = made_up(Simulated(truth, confusion, answers, torch.from_numpy(6 * logits)))
    shown = viewed(dataset, outcome, images)
    assert {row[0] for row in shown["workers"] if row[8]} == set(dataset.workers[18:])
    assert shown["suspects"]["count"] == 2


@pytest.mark.parametrize(
    ("counts", "labels", "found"),
    [
        ([3, 3, 3], ["3"], [3]),
        ([1, 1, 3], ["1", "2", "3"], [2, 0, 1]),
        ([1, 2, 5, 30], ["1", "2–3", "4–7", "8–15", "16–30"], [1, 1, 1, 0, 1]),
        ([20, 25, 100], ["20–31", "32–63", "64–100"], [2, 0, 1]),
    ],
)
def test_a_histogram_has_no_bins_that_can_hold_nothing(counts: list[int], labels: list[str], found: list[int]) -> None:
    assert _histogram(np.array(counts)) == {"labels": labels, "counts": found}
