"""The class, used as a notebook written for peerannot uses it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from crowdlayer import CrowdLayer, Crowdlayer
from crowdlayer.errors import DataError, SettingsError
from tests.conftest import SHARED

OPTIONS: dict[str, Any] = {"batch_size": 16, "lr": 0.01, "img_size": 16, "small_images": "false", "verbose": False}


@pytest.fixture
def data(shapes: Path, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(shapes, tmp_path / "data"))


def test_a_notebook_for_peerannot_runs(data: Path) -> None:
    """The arguments of peerannot's command line, as its runner and its tutorials hand them over."""
    options: dict[str, Any] = {
        "n_workers": 99,
        "labels": None,
        "metadata_path": None,
        "n_params": 3072,
        "strategy": "crowdlayer",
        "img_size": 16,
        "data_augmentation": True,
        "path_remove": None,
        "lr": 0.01,
        "momentum": 0.9,
        "decay": 5e-4,
        "scheduler": "multistep",
        "milestones": [1],
        "lr_decay": 0.1,
        "num_workers": 1,
        "batch_size": 16,
        "freeze": False,
        "seed": 0,
        "small_images": "false",
    }
    strategy = Crowdlayer(
        tasks_path=str(data),
        answers=str(data / "answers.json"),
        model="resnet18",
        n_classes=3,
        optimizer="SGD",
        n_epochs=2,
        scale=1e-4,
        verbose=False,
        pretrained=False,
        output_name="peer",
        **options,
    )
    strategy.run(**options)
    results = json.loads((data / "results/peer.json").read_text())
    assert len(results["train_loss"]) == len(results["val_loss"]) == len(results["val_accuracy"]) == 2
    assert {"test_loss", "test_accuracy", "test_ece"} <= set(results)
    best = torch.load(data / "best_models/peer.pth", weights_only=True)
    assert best["confusion"].shape == (strategy.n_workers, 3, 3)
    strategy.model.load_state_dict(best["classifier"])


def test_path_and_str_both_work_and_defaults_are_the_contracts(data: Path) -> None:
    strategy = Crowdlayer(data, data / "answers.json", "squeezenet1_1", 3, "adam", 1, img_size=32, verbose=False)
    assert strategy.trainloader.batch_size == 64
    assert strategy.n_epochs == 1
    assert strategy.n_classes == 3


def test_run_epoch_appends_the_metrics_and_moves_both_parts(data: Path) -> None:
    strategy = Crowdlayer(data, data / "answers.json", "resnet18", 3, "sgd", 1, **OPTIONS)
    before = strategy.crowdlayer_net.confusion.detach().clone()
    logger: dict[str, Any] = {"train_loss": [], "val_loss": []}
    returned = strategy.run_epoch(
        strategy.crowdlayer_net,
        strategy.trainloader,
        strategy.criterion,
        strategy.optimizer,
        strategy.optimizer2,
        logger,
    )
    assert returned is logger
    assert len(logger["train_loss"]) == 1
    assert not torch.equal(strategy.crowdlayer_net.confusion, before)


def test_run_epoch_takes_an_optimizer_for_each_part(data: Path) -> None:
    """As peerannot's own class has them: what neither was given stays as it was."""
    strategy = Crowdlayer(data, data / "answers.json", "resnet18", 3, "sgd", 1, **OPTIONS)
    network = strategy.crowdlayer_net
    head, first = (strategy.model.get_parameter(name) for name in ("fc.weight", "conv1.weight"))
    confusion = strategy.crowdlayer_net.confusion
    before = [part.detach().clone() for part in (head, confusion, first)]
    of_head, of_confusion = torch.optim.SGD([head], lr=0.1), torch.optim.Adam([confusion], lr=0.1)

    strategy.run_epoch(network, strategy.trainloader, strategy.criterion, of_head, of_confusion, {})

    moved = [not torch.equal(part, was) for part, was in zip((head, confusion, first), before, strict=True)]
    assert moved == [True, True, False]


def test_loaders_can_be_looped_over(data: Path) -> None:
    strategy = Crowdlayer(data, data / "answers.json", "resnet18", 3, "sgd", 1, **OPTIONS)
    batch = next(iter(strategy.trainloader))
    assert batch.images.shape[1:] == (3, 16, 16)
    for loader, n in ((strategy.valloader, 9), (strategy.testloader, 9)):
        assert loader is not None
        assert sum(len(labels) for _, labels in loader) == n == len(loader.dataset)


def test_an_unknown_argument_is_refused_with_the_nearest(data: Path) -> None:
    with pytest.raises(SettingsError, match=r"batchsize: is not a setting, did you mean batch_size\?"):
        Crowdlayer(data, data / "answers.json", "resnet18", 3, "sgd", 1, batchsize=3)
    strategy = Crowdlayer(data, data / "answers.json", "resnet18", 3, "sgd", 1, **OPTIONS)
    with pytest.raises(SettingsError, match=r"milestone: is not a setting, did you mean milestones\?"):
        strategy.run(milestone=[3])


def test_wrong_values_are_all_named_at_once(data: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        Crowdlayer(data, data / "answers.json", "resnet19", 3, "rmsprop", 0, lr=-1)
    assert all(name in str(caught.value) for name in ("model", "optimizer", "n_epochs", "lr"))


def test_setup_with_other_settings_makes_other_loaders(data: Path) -> None:
    strategy = Crowdlayer(data, data / "answers.json", "resnet18", 3, "sgd", 1, **OPTIONS)
    network = strategy.crowdlayer_net
    strategy.setup()
    assert strategy.crowdlayer_net is network
    strategy.setup(batch_size=5)
    assert len(strategy.trainloader) == 5


def test_pretrained_works(data: Path, tmp_path: Path) -> None:
    first = Crowdlayer(data, data / "answers.json", "resnet18", 3, "sgd", 1, **OPTIONS)
    torch.save(first.model.state_dict(), tmp_path / "w.pth")
    second = Crowdlayer(
        data, data / "answers.json", "resnet18", 3, "sgd", 1, pretrained=tmp_path / "w.pth", seed=9, **OPTIONS
    )
    name = "layer1.0.conv1.weight"
    assert torch.equal(first.model.get_parameter(name), second.model.get_parameter(name))


def test_n_classes_must_agree_with_the_data(data: Path) -> None:
    with pytest.raises(SettingsError, match="N_CLASSES: must agree"):
        Crowdlayer(data, data / "answers.json", "resnet18", 4, "sgd", 1, **OPTIONS)


def test_missing_answers_are_said(data: Path) -> None:
    with pytest.raises((DataError, SettingsError), match="ANSWERS: must be a file"):
        Crowdlayer(data, data / "nothing.json", "resnet18", 3, "sgd", 1, **OPTIONS)


def test_the_module_is_exported() -> None:
    assert CrowdLayer(2, 3).confusion.shape == (2, 3, 3)


@pytest.mark.skipif(not (SHARED / "data/labelme").is_dir(), reason="no ../shared/data")
def test_labelme_trains_though_its_ids_have_gaps(tmp_path: Path) -> None:
    data = SHARED / "data/labelme"
    strategy = Crowdlayer(
        data, data / "answers.json", "squeezenet1_1", 8, "sgd", 1, lr=0.01, img_size=32, verbose=False
    )
    assert strategy.n_workers == 59
    assert len(strategy.trainloader.dataset) == 700


def test_loss_and_gradients_are_those_of_peerannots_own_code() -> None:
    peerannot = pytest.importorskip("peerannot.models.agg_deep.Crowdlayer", reason="peerannot is not installed")
    torch.manual_seed(0)
    n_tasks, n_workers, n_classes = 10, 6, 4
    theirs = peerannot.Crowdlayer_net(n_classes, n_workers, torch.nn.Linear(5, n_classes))
    with torch.no_grad():
        theirs.confusion.add_(0.2 * torch.randn_like(theirs.confusion))
    layer = CrowdLayer.of(theirs.confusion.detach().clone())
    x, dense = torch.randn(n_tasks, 5), torch.randint(-1, n_classes, (n_tasks, n_workers))
    criterion = torch.nn.CrossEntropyLoss(ignore_index=-1, reduction="mean")
    expected = criterion(theirs(x).reshape(-1, n_classes), dense.view(-1))
    expected.backward()
    from crowdlayer.learning.crowd_model import CrowdLoss

    task, worker = torch.nonzero(dense >= 0, as_tuple=True)
    loss = CrowdLoss("answer")(layer(theirs.classifier(x), task, worker), dense[task, worker], n_tasks)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(layer.confusion.grad, theirs.confusion.grad, atol=1e-6, rtol=0)
