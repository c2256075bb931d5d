"""What FOLDS is worth: labels and workers judged by networks that have seen the answers, and by ones that have not.

    python -m tests.bench.folds --out folds.jsonl --seeds 3     # goes on where it was stopped; then prints the table

The recommended settings on the conditions of tests.bench.quality, and on crowds of one to three answers a task whose
images a network learns by heart. `right` is the share of labels that are right, `score` what they are held to be sure,
`log-loss` that of the posterior, `found` the F1 of the majority's wrong labels as `is_label_issue` has them, `too high`
by how much the workers' quality is above the share of their answers that is right, `holds` how many intervals of
workers with ten answers and more have that share within.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crowdlayer.answers import Answers
from crowdlayer.data.dataset import CrowdImages, Dataset, LabelledImages
from crowdlayer.learning.folds import shared_out
from crowdlayer.learning.inference import Inferred, Predictions, infer, temperatures
from crowdlayer.learning.progress import Progress
from crowdlayer.learning.trainer import Trainer
from tests.bench.crowds import Pool, Share, at_most, pattern_pool, share
from tests.bench.quality import make_trainer, pool_of, without_torn_line
from tests.bench.quality_variants import BUDGET, CONDITIONS, RECOMMENDED, VARIANTS, Condition
from tests.crowds import Crowd

FOLDS = 5
BY_HEART = "by heart"
DATA = {
    **{f"{BY_HEART}, {n}": Condition(BY_HEART, 32, per_task=n) for n in (1, 2, 3)},
    "labelme": CONDITIONS["labelme"],
    "labelme, 1": replace(CONDITIONS["labelme"], per_task=1),
    "cifar10n": CONDITIONS["cifar10n"],
    "cifar10n, 1": CONDITIONS["cifar10n-rand1"],
    "spammers": CONDITIONS["spammers"],
}
"""Conditions by name, behind which is how many answers a task has, where it is not all there are."""


@dataclass(frozen=True)
class Figures:
    """See above."""

    right: float
    score: float
    log_loss: float
    found: float
    too_high: float
    holds: float


def by_heart(seed: int) -> Pool:
    """Five classes, twenty workers who are right in 40 to 90 % and else say anything, five answers a task."""
    rng = np.random.default_rng((seed, 7))
    pool = pattern_pool(800, 5, 32, rng)
    skill, eye = rng.uniform(0.4, 0.9, (20, 1, 1)), np.eye(5)
    votes = Crowd(skill * eye + (1 - skill) / 4 * (1 - eye)).answers(pool.truth, 5, rng)
    given = np.array([(task, int(worker), label) for task, vote in enumerate(votes) for worker, label in vote.items()])
    return replace(pool, answers=Answers(800, 20, *given.T.copy()))


def dataset_of(part: Share, with_truth: bool) -> Dataset:
    """The share as a data set of the job: with true labels to calibrate by, or with held-out answers."""

    def crowd(answers: Answers, truth: np.ndarray) -> CrowdImages:
        names = [str(task) for task in range(answers.n_tasks)]
        return CrowdImages(names, names, answers, truth)

    unknown = np.full(len(part.held), -1)
    val = LabelledImages([str(n) for n in range(len(part.val))], part.val_labels.numpy()) if with_truth else None
    classes, workers = ([str(n) for n in range(count)] for count in (part.n_classes, part.answers.n_workers))
    held = None if with_truth else crowd(part.held_answers, unknown)
    return Dataset("share", classes, workers, crowd(part.answers, part.truth), held, val, None)


def trained(part: Share, condition: Condition, seed: int) -> tuple[Trainer, Tensor]:
    """The trainer after its last epoch, and its log P(answered | true, worker)."""
    trainer = make_trainer(part, condition.size, BUDGET | condition.budget | VARIANTS[RECOMMENDED], "small", seed)
    for epoch in range(trainer.settings.n_epochs):
        trainer.train_epoch(trainer.learner, trainer.train, Progress(epoch))
        trainer.learner.scheduler.step()
    return trainer, trainer.learner.crowd_layer.answer_log_likelihood().detach().float().cpu()


def figures(inferred: Inferred, part: Share) -> Figures:
    """Of the tasks trained on alone."""
    n, truth = len(part.truth), torch.from_numpy(part.truth)
    worker, workers = torch.from_numpy(part.answers.worker), inferred.workers
    right = torch.from_numpy(part.answers.label == part.truth[part.answers.task]).double()
    count = torch.bincount(worker, minlength=part.answers.n_workers)
    share = torch.zeros(len(count), dtype=torch.float64).index_add_(0, worker, right) / count.clamp_min(1)
    wrong, issue = inferred.majority[:n] != truth, inferred.labels.issue[:n]
    holds = ((workers.low <= share) & (share <= workers.high))[count >= 10]
    return Figures(
        right=float((inferred.labels.label[:n] == truth).double().mean()),
        score=float(inferred.labels.score[:n].mean()),
        log_loss=-float(inferred.posterior[:n].gather(1, truth[:, None]).clamp_min(1e-12).log().mean()),
        found=float(2 * (wrong & issue).sum() / (wrong.sum() + issue.sum()).clamp_min(1)),
        too_high=float(((workers.quality - share) * count).sum() / count.sum()),
        holds=float(holds.double().mean()),
    )


def compared(part: Share, condition: Condition, seed: int) -> dict[str, Figures]:
    """The figures without and with FOLDS, calibrated by true labels and by held-out answers."""
    run, likelihood = trained(part, condition, seed)
    said = Predictions(run.predict(part.train), run.predict(part.val), None)
    held = run.predict(part.held)
    fold = shared_out(len(part.train), FOLDS, seed)
    unseen = {True: torch.empty_like(said.train), False: torch.empty_like(said.train)}
    for k in range(FOLDS):
        rest, mine = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        answers = part.answers.of_tasks(rest)
        some = replace(part, train=part.train[rest], truth=part.truth[rest], answers=answers)
        other, others = trained(some, condition, seed)
        train, logits = other.predict(some.train), other.predict(part.train[mine])
        for with_truth, images in ((True, part.val), (False, part.held)):
            known = Predictions(train, other.predict(images), None)
            unseen[with_truth][mine] = logits / temperatures(dataset_of(some, with_truth), known, others)[0]
    found = {}
    for with_truth, by in ((True, "val/"), (False, "held-out answers")):
        dataset = dataset_of(part, with_truth)
        seen = said if with_truth else replace(said, validation=held)
        found[f"0 by {by}"] = figures(infer(dataset, seen, likelihood)[1], part)
        judged = replace(seen, unseen=unseen[with_truth])
        found[f"{FOLDS} by {by}"] = figures(infer(dataset, judged, likelihood)[1], part)
    return found


def table(lines: Sequence[dict[str, object]]) -> str:
    """Means over the seeds, in Markdown."""
    rows: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for line in lines:
        assert isinstance(line["found"], dict)
        for judged, found in line["found"].items():
            rows[str(line["data"]), judged].append(found)
    names = list(Figures.__dataclass_fields__)
    text = [f"| data | FOLDS | {' | '.join(name.replace('_', ' ') for name in names)} | seeds |"]
    text.append("| --- " * (len(names) + 3) + "|")
    for (data, judged), found in rows.items():
        means = [f"{sum(one[name] for one in found) / len(found):.3f}" for name in names]
        text.append(f"| {data} | {judged} | {' | '.join(means)} | {len(found)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", nargs="*", choices=DATA, default=list(DATA))
    arguments = parser.parse_args()
    without_torn_line(arguments.out)
    lines = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.is_file() else []
    done = {(line["data"], line["seed"]) for line in lines}
    for seed in range(arguments.seeds):
        for name in arguments.data:
            if (name, seed) in done:
                continue
            condition = DATA[name]
            pool = by_heart(seed) if condition.name == BY_HEART else pool_of(condition, seed)
            if condition.name == BY_HEART and condition.per_task is not None:
                pool = replace(pool, answers=at_most(pool.answers, condition.per_task, np.random.default_rng(seed)))
            part = share(pool, seed, 0, condition.n_folds, condition.n_train, condition.per_task)
            found = {judged: asdict(figure) for judged, figure in compared(part, condition, seed).items()}
            lines.append({"data": name, "seed": seed, "found": found})
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
