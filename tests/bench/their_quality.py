"""peerannot's class, trained in an environment that has it: no import of ours but the network, no request to its hub.

Its data sets, loaders, layer, loss, optimisers and `run_epoch` are its own; only the epochs are counted here, to save
the logits after each. They are written beside the data, with the order in which it has read the images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch.utils.data import DataLoader, Dataset

from tests.bench.networks import SmallNet


def main(
    tasks: str, size: int, n_classes: int, n_workers: int, lr: float, n_epochs: int, batch_size: int, seed: int
) -> None:
    torch.hub.list = lambda *_, **__: torchvision.models.list_models(module=torchvision.models)
    torch.hub.load = lambda *_, **__: SmallNet(n_classes)
    from peerannot.models import Crowdlayer
    from peerannot.training.load_data import load_data

    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "tasks_path": tasks, "answers": f"{tasks}/answers.json", "model": "resnet18", "n_classes": n_classes,
        "optimizer": "adam", "n_epochs": n_epochs, "batch_size": batch_size, "lr": lr, "scheduler": "cosine",
        "milestones": [n_epochs], "img_size": size, "data_augmentation": False, "num_workers": 0,
        "n_workers": n_workers, "freeze": False, "path_remove": None,
    }  # fmt: skip
    theirs = Crowdlayer(**options, verbose=False)
    held = load_data(Path(tasks) / "held", None, **options)
    splits = {"test": theirs.testset, "val": theirs.valset, "held": held}
    for name, split in splits.items():
        order = [int(Path(path).stem.split("-")[-1]) for path, _ in split.samples]
        np.save(f"{tasks}/{name}-order.npy", np.array(order))
    net = theirs.crowdlayer_net
    losses: dict[str, list[float]] = {"train_loss": []}
    for epoch in range(n_epochs):
        theirs.run_epoch(net, theirs.trainloader, theirs.criterion, theirs.optimizer, theirs.optimizer2, losses)
        theirs.scheduler.step()
        theirs.scheduler2.step()
        for name, split in splits.items():
            np.save(f"{tasks}/{name}-{epoch}.npy", logits(net.classifier, split))
        np.save(f"{tasks}/confusion-{epoch}.npy", net.confusion.detach().numpy())


@torch.no_grad()
def logits(classifier: torch.nn.Module, images: Dataset[Any]) -> np.ndarray[Any, Any]:
    """(images, classes), in the data set's order."""
    classifier.eval()
    return torch.cat([classifier(batch[0]) for batch in DataLoader(images, batch_size=256)]).numpy()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
