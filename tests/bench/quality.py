"""Which worker model, regulariser, start and rule are worth having: paired runs over seeds × folds, with intervals.

    python -m tests.bench.quality run labelme --out runs.jsonl          # goes on where it was stopped
    python -m tests.bench.quality table runs.jsonl --json table.json

A run trains one variant by the job's own Trainer and writes one line: what each epoch is worth on test images with true
labels, and what every rule would have seen of it; so one run tells about all rules. A pair is one seed and one fold:
the same images to train on, the same first weights, the same order. Pairs share images, so the intervals (Student's t
over pairs) are somewhat narrow.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from crowdlayer.answers import majority_vote
from crowdlayer.data.images import CrowdLoader
from crowdlayer.learning import metrics
from crowdlayer.learning.aggregation import dawid_skene
from crowdlayer.learning.classifier import build_classifier
from crowdlayer.learning.crowd_layer import WORKER_MODELS, WorkerModel
from crowdlayer.learning.crowd_model import CrowdLoss
from crowdlayer.learning.devices import make_accelerator
from crowdlayer.learning.progress import Progress
from crowdlayer.learning.trainer import Trainer, Validation
from crowdlayer.machine.processes import Processes
from crowdlayer.settings import TrainingSettings
from tests.bench.crowds import SIMULATED, Pool, Share, answered, pattern_pool, read_pool, share, unlike
from tests.bench.networks import SmallNet
from tests.bench.quality_tables import read, table
from tests.bench.quality_variants import BUDGET, CONDITIONS, THEIRS, VARIANTS, Condition
from tests.conftest import ROOT, SHARED

SPLITS = ("test", "val", "held")


def make_trainer(part: Share, size: int, options: dict[str, Any], model: str, seed: int) -> Trainer:
    """The job's trainer for one variant on one pair's share."""
    options = dict(options)
    labels, decay_crowd = options.pop("labels", None), options.pop("decay_crowd", 0.0)
    settings = TrainingSettings(**options, seed=seed, img_size=size, verbose=False)
    accelerator = make_accelerator(settings)
    torch.manual_seed(seed)
    classifier = (
        SmallNet(part.n_classes)
        if model == "small"
        else build_classifier(model, part.n_classes, size, False, False, "auto")
    )
    loader = CrowdLoader(
        part.train,
        part.answers,
        settings.batch_size,
        seed,
        settings.data_augmentation,
        accelerator.device,
        Processes.joined(),
    )
    validation = Validation(part.val, part.val_labels, None)
    trainer = Trainer(settings, accelerator, classifier, part.n_classes, loader, validation)
    trainer.learner.scheduler.optimizer.param_groups[1]["weight_decay"] = decay_crowd
    match labels:
        case "majority":
            trainer.learn_labels(majority_vote(part.answers, part.n_classes))
        case "dawid-skene":
            trainer.learn_labels(dawid_skene(part.answers, part.n_classes).posterior.argmax(1).numpy())
        case "truth":
            trainer.learn_labels(part.truth)
        case "answers":
            trainer.learner.plain = True
    return trainer


@dataclass(frozen=True)
class Epoch:
    """Logits, (images, classes), after an epoch, and the worker model on the CPU that it ended with."""

    test: Tensor
    val: Tensor
    held: Tensor
    crowd_layer: WorkerModel


def our_epochs(part: Share, size: int, options: dict[str, Any], model: str, seed: int) -> Iterator[Epoch]:
    """Train a variant by the job's own trainer."""
    trainer = make_trainer(part, size, options, model, seed)
    for epoch in range(trainer.settings.n_epochs):
        trainer.train_epoch(trainer.learner, trainer.train, Progress(epoch))
        trainer.learner.scheduler.step()
        test, val, held = (trainer.predict(images) for images in (part.test, part.val, part.held))
        yield Epoch(test, val, held, copy.deepcopy(trainer.learner.crowd_layer).cpu())


def their_epochs(part: Share, size: int, options: dict[str, Any], python: str, seed: int) -> Iterator[Epoch]:
    """Train peerannot's own class on the same images, in the environment that `python` is of."""
    with tempfile.TemporaryDirectory(prefix="labelme-") as folder:  # elsewhere it knows of no classes
        answers = part.answers
        votes: dict[int, dict[int, int]] = {task: {} for task in range(len(part.train))}
        for task, worker, label in zip(answers.task, answers.worker, answers.label, strict=True):
            votes[int(task)][int(worker)] = int(label)
        (Path(folder) / "answers.json").write_text(json.dumps(votes))
        for name, images, labels in (
            ("train", part.train, part.truth),
            ("val", part.val, part.val_labels),
            ("test", part.test, part.test_labels),
            ("held", part.held, np.zeros(len(part.held), dtype=np.int64)),
        ):
            for n, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
                path = Path(folder) / name / f"{label:03}" / f"{n:05}-{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
        said = {"tasks": folder, "size": size, "n_classes": part.n_classes, "n_workers": answers.n_workers}
        said |= {name: options[name] for name in ("lr", "n_epochs", "batch_size")} | {"seed": seed}
        command = [python, "-m", "tests.bench.their_quality", json.dumps(said)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        order = {name: torch.from_numpy(np.load(f"{folder}/{name}-order.npy")).argsort() for name in SPLITS}
        for epoch in range(options["n_epochs"]):
            test, val, held = (torch.from_numpy(np.load(f"{folder}/{n}-{epoch}.npy"))[order[n]] for n in SPLITS)
            layer = WORKER_MODELS["matrix"](answers.n_workers, part.n_classes)
            layer.load_state_dict({"confusion": torch.from_numpy(np.load(f"{folder}/confusion-{epoch}.npy"))})
            yield Epoch(test, val, held, layer)


def seen_of(part: Share, epochs: Iterable[Epoch]) -> dict[str, Any]:
    """Per epoch what the test says and what the rules see."""
    answers = part.held_answers
    task, worker, label = (torch.from_numpy(x) for x in (answers.task, answers.worker, answers.label))
    seen: dict[str, list[Any]] = defaultdict(list)
    for epoch in epochs:

        def by_labels(temperature: float, val: Tensor = epoch.val) -> float:
            return metrics.cross_entropy(val / temperature, part.val_labels)

        def by_answers(temperature: float, epoch: Epoch = epoch) -> float:
            scores = epoch.crowd_layer(epoch.held / temperature, task, worker)
            return float(CrowdLoss("task")(scores, label, answers.n_tasks))

        with torch.no_grad():
            scaled = epoch.test / metrics.best_temperature(by_labels)
            gaps = metrics.calibration_gaps(scaled, part.test_labels)
            seen["test_scaled_gaps"].append([round(gap, 4) for gap in gaps.tolist()])
            figures = {
                "test_accuracy": metrics.accuracy(epoch.test.argmax(1), part.test_labels),
                "test_loss": metrics.cross_entropy(epoch.test, part.test_labels),
                "test_ece": metrics.expected_calibration_error(epoch.test, part.test_labels),
                "test_scaled_ece": metrics.expected_calibration_error(scaled, part.test_labels),
                "val_loss": by_labels(1),
                "val_calibrated": metrics.calibrated(by_labels, steps=15),
                "val_accuracy": metrics.accuracy(epoch.val.argmax(1), part.val_labels),
                "held_loss": by_answers(1),
                "held_calibrated": metrics.calibrated(by_answers, steps=15),
                "held_agreement": metrics.accuracy(epoch.held.argmax(1)[task], label),
            }
        for name, figure in figures.items():
            seen[name].append(round(figure, 5))
    return dict(seen) | {"n_test": len(part.test_labels)}


def pool_of(condition: Condition, seed: int) -> Pool:
    """The images and answers of a condition; a simulated crowd is drawn anew for every seed."""
    if condition.name not in SIMULATED:
        location = SHARED / "data" / ("labelme" if condition.name == "labelme" else f"{condition.name}.zip")
        return read_pool(str(location), condition.size)
    rng = np.random.default_rng((seed, 3))
    if condition.name == "few":
        pool = pattern_pool(8000, 100, condition.size, rng)
    else:
        pool = read_pool(str(SHARED / "data" / "cifar10n.zip"), condition.size)
        if condition.name == "unlike":
            pool = unlike(pool, rng)
    return replace(pool, answers=answered(pool.truth, pool.n_classes, condition.name, rng))


def run(arguments: argparse.Namespace) -> None:
    """Every variant of every pair that `--out` does not hold yet, pair by pair, so that what is there is paired."""
    condition = CONDITIONS[arguments.condition]
    without_torn_line(arguments.out)
    done = {
        (line["condition"], line["model"], line["variant"], line["seed"], line["fold"]) for line in read(arguments.out)
    }
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        pool: Pool | None = None
        for fold in range(min(condition.n_folds, arguments.folds)):
            for variant in arguments.variants or VARIANTS:
                key = (arguments.condition, arguments.model, variant, seed, fold)
                if key in done:
                    continue
                pool = pool or pool_of(condition, seed)
                part = share(pool, seed, fold, condition.n_folds, condition.n_train, condition.per_task)
                started = time.monotonic()
                options = BUDGET | condition.budget | VARIANTS.get(variant, {})
                chance = 100 * seed + fold
                if variant == THEIRS:
                    epochs = their_epochs(part, condition.size, options, arguments.python, chance)
                else:
                    epochs = our_epochs(part, condition.size, options, arguments.model, chance)
                seen = seen_of(part, epochs)
                names = ("condition", "model", "variant", "seed", "fold")
                line = dict(zip(names, key, strict=True)) | {"seconds": round(time.monotonic() - started, 1)} | seen
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


def without_torn_line(path: Path) -> None:
    """Take away the end of a line that was cut off when a run was stopped."""
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("condition", choices=CONDITIONS)
    runs.add_argument("--out", type=Path, required=True)
    runs.add_argument("--variants", nargs="*", choices=[*VARIANTS, THEIRS])
    runs.add_argument("--python", default=sys.executable, help=f"of the environment with peerannot, for {THEIRS!r}")
    runs.add_argument("--first-seed", type=int, default=0)
    runs.add_argument("--seeds", type=int, default=4)
    runs.add_argument("--folds", type=int, default=5)
    runs.add_argument("--model", default="small", help="small, or a model of torchvision for a GPU")
    runs.set_defaults(command=run)
    tables = commands.add_parser("table")
    tables.add_argument("runs", nargs="+", type=Path)
    tables.add_argument("--json", type=Path)
    tables.add_argument("--markdown", action="store_true", help="as the documentation has it")
    tables.add_argument("--baseline", default="majority", choices=[*VARIANTS, THEIRS])
    tables.set_defaults(command=table)
    arguments = parser.parse_args(given)
    arguments.command(arguments)


if __name__ == "__main__":
    main()
