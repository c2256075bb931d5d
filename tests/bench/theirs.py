"""peerannot's class as a contender, in an environment that has it: no import of ours, no request to its model hub."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision


def main(tasks: str, size: int, model: str, augmented: bool = False, freeze: bool = False, loaders: int = 0) -> None:
    """An epoch for every line that comes in; lines are answered as `contenders.serve` does."""
    torch.hub.list = lambda *_, **__: torchvision.models.list_models(module=torchvision.models)
    torch.hub.load = lambda _, name, **options: torchvision.models.get_model(name, weights=options.get("weights"))
    from peerannot.models import Crowdlayer

    answers = f"{tasks}/answers.json"
    with open(answers) as file:  # noqa: PTH123
        n_workers = 1 + max(int(worker) for votes in json.load(file).values() for worker in votes)
    n_classes = sum(path.is_dir() for path in Path(tasks, "train").iterdir())
    options: dict[str, Any] = {
        "tasks_path": tasks, "answers": answers, "model": model, "n_classes": n_classes, "optimizer": "SGD",
        "n_epochs": 1, "batch_size": 64, "lr": 0.001, "momentum": 0.9, "decay": 5e-4, "scheduler": "multistep",
        "milestones": [50], "lr_decay": 0.1, "img_size": size, "data_augmentation": augmented, "num_workers": loaders,
        "n_workers": n_workers, "freeze": freeze, "path_remove": None,
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = Crowdlayer(**options, verbose=False)
    theirs.crowdlayer_net.to("cuda" if torch.cuda.is_available() else "cpu")
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), seconds()
        theirs.run_epoch(
            theirs.crowdlayer_net, theirs.trainloader, theirs.criterion, theirs.optimizer, theirs.optimizer2,
            {"train_loss": []},
        )  # fmt: skip
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"wall": time.perf_counter() - wall, "cpu": seconds() - cpu, "peak": peak}), flush=True)


def seconds() -> float:
    """CPU seconds of this process and of the loaders that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
