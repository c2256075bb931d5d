"""The class, used as a notebook written for peerannot uses it."""

from __future__ import annotations

import copy
import gc
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from crowdlayer import CrowdLayer, Crowdlayer
from crowdlayer.errors import DataError, SettingsError
from tests.conftest import ROOT, SHARED, Store

OPTIONS: dict[str, Any] = {"batch_size": 16, "lr": 0.01, "img_size": 16, "small_images": "false", "verbose": False}


@pytest.fixture
def data(shapes: Path, tmp_path: Path) -> Path:
    """A copy that may be written to."""
    return Path(shutil.copytree(shapes, tmp_path / "data"))


def small(tasks: Path, answers: str | Path | None = None, n_epochs: int = 1, **kwargs: Any) -> Crowdlayer:
    """With a network that is soon made and trained."""
    options = OPTIONS | {"img_size": 32, "small_images": "auto"} | kwargs
    return Crowdlayer(tasks, answers, "shufflenet_v2_x0_5", 3, "sgd", n_epochs, **options)


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


def test_the_rate_of_the_matrices_is_theirs_alone(data: Path) -> None:
    """As of peerannot's second optimiser and scheduler."""
    strategy = small(data, n_epochs=2, milestones=[1])
    before = strategy.crowdlayer_net.confusion.detach().clone()
    (group,) = strategy.optimizer2.param_groups
    assert [weight.shape for weight in group["params"]] == [before.shape]
    group["lr"] = 0
    assert strategy.optimizer.param_groups[0]["lr"] == OPTIONS["lr"]
    assert len(strategy.run()["train_loss"]) == 2
    assert torch.equal(strategy.crowdlayer_net.confusion, before)
    group["lr"] = 0.5
    strategy.scheduler2.step()
    assert strategy.scheduler2.get_last_lr() == [0.5]
    assert strategy.scheduler2.optimizer.param_groups == [group]


def test_the_second_optimizer_is_nothing_without_the_first(data: Path) -> None:
    strategy = small(data)
    parts = strategy.crowdlayer_net, strategy.trainloader, strategy.criterion
    with pytest.raises(ValueError, match="optimizer2: must be the caller's own"):
        strategy.run_epoch(*parts, torch.optim.SGD(strategy.model.parameters()), strategy.optimizer2, {})


def test_the_criterion_takes_logits_and_labels_as_peerannots_evaluation_hands_them_over(data: Path) -> None:
    """Where -1 is no label."""
    strategy = small(data)
    network = strategy.model.eval()
    for images, labels in strategy.valloader:
        labels[0] = -1
        with torch.no_grad():
            outputs = network(images)
            loss = strategy.criterion(outputs, labels)
        expected = torch.nn.CrossEntropyLoss(ignore_index=-1, reduction="mean")(outputs, labels)
        assert loss.item() == pytest.approx(expected.item())


def test_what_the_page_calls_different_is(data: Path) -> None:
    """`crowdlayer/docs/peerannot.md`, for those who call the parts themselves."""
    strategy = small(data)
    batch = next(iter(strategy.trainloader))
    with pytest.raises(TypeError, match=r"task.*worker"):
        strategy.crowdlayer_net(batch.images)
    logits, scores = strategy.crowdlayer_net(batch.images, batch.task, batch.worker)
    assert (logits.shape, scores.shape) == ((len(batch.images), 3), (len(batch.label), 3))
    state = strategy.crowdlayer_net.state_dict()
    assert torch.equal(state["crowd_layer.confusion"], strategy.crowdlayer_net.confusion)
    assert "confusion" not in state
    assert not [name for name in ("n_worker", "n_classes", "workers") if hasattr(strategy.crowdlayer_net, name)]
    text = " ".join((ROOT / "crowdlayer/docs/peerannot.md").read_text().split())
    missing = text.partition("**Not there**")[2].partition("; of a loader")[0]
    assert not [name for name in re.findall(r"`(\w+)`", missing) if hasattr(strategy, name)]
    with pytest.raises(AttributeError):
        strategy.n_epochs = 3  # type: ignore[misc]
    for refused in ({"milestones": [0]}, {"model": "modellabelme"}, {"model": "modelmusic"}):
        with pytest.raises(SettingsError, match=f"^{next(iter(refused))}: "):
            strategy.setup(**refused)


def test_loaders_can_be_looped_over(data: Path) -> None:
    strategy = Crowdlayer(data, data / "answers.json", "resnet18", 3, "sgd", 1, **OPTIONS)
    batch = next(iter(strategy.trainloader))
    assert batch.images.shape[1:] == (3, 16, 16)
    for loader, n in ((strategy.valloader, 9), (strategy.testloader, 9)):
        assert loader is not None
        assert sum(len(labels) for _, labels in loader) == n == len(loader.dataset)


def test_a_bucket_is_refused_as_what_was_given() -> None:
    with pytest.raises(
        SettingsError, match=r"^tasks_path: must be a folder or archive on this machine, got 's3://b/x'$"
    ):
        Crowdlayer("s3://b/x", None, "resnet18", 2, "sgd", 1)


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


def test_a_call_that_failed_fails_again_and_leaves_all_as_it_was(data: Path) -> None:
    """Not: the old network is trained, and the results say the new settings."""
    strategy = small(data)
    for _ in range(2):
        with pytest.raises(SettingsError, match="PATH_REMOVE: must be a file"):
            strategy.run(path_remove="nothing.txt", n_epochs=2, output_name="other")
    assert (strategy.n_epochs, strategy.output_name) == (1, "crowdlayer")
    results = strategy.run()
    assert (len(results["train_loss"]), results["job"]["settings"]["path_remove"]) == (1, None)


def test_a_second_run_is_what_a_first_one_is(data: Path) -> None:
    strategy = small(data, n_epochs=2, scheduler="cosine")
    first = strategy.run()
    trained = strategy.model
    second = strategy.run()
    assert second["train_loss"] == first["train_loss"]
    assert strategy.model is not trained
    columns = (data / "results/crowdlayer/results.csv").read_text().splitlines()
    assert float(columns[1].split(",")[columns[0].split(",").index("lr/pg0")]) == OPTIONS["lr"]


def test_after_a_run_all_of_it_is_the_chosen_model_with_averaged_weights_too(data: Path) -> None:
    strategy = small(data, n_epochs=2, ema=0.9)
    strategy.run()
    best = torch.load(data / "best_models/crowdlayer.pth", weights_only=True)
    assert torch.equal(strategy.crowdlayer_net.confusion, best["confusion"])
    for name, weights in strategy.crowdlayer_net.classifier.state_dict().items():
        assert torch.equal(weights, best["classifier"][name])


def test_an_output_that_cannot_be_written_is_told_before_anything_is_trained(data: Path) -> None:
    (data / "results").touch()
    strategy = small(data)
    before = strategy.crowdlayer_net.confusion.detach().clone()
    with pytest.raises(SettingsError, match="must be a folder, a file is in its place"):
        strategy.run()
    assert torch.equal(strategy.crowdlayer_net.confusion, before)


def test_of_an_archive_the_results_lie_beside_it(data: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    archive = Path(shutil.make_archive(str(tmp_path / "packed/shapes"), "zip", data))
    small(archive).run()
    assert {path.name for path in archive.parent.iterdir()} == {"shapes.zip", "results", "best_models"}


def test_what_is_unpacked_of_an_archive_is_there_as_long_as_the_object_or_a_copy_of_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that are not held are decoded from it in every epoch."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    archive = Path(shutil.make_archive(str(tmp_path / "shapes"), "zip", data))
    held, strategy = small(archive), small(archive, max_cache=0)
    copied = copy.deepcopy(strategy)
    assert strategy.run()["train_loss"] == held.run()["train_loss"]
    assert torch.equal(copied.trainloader.dataset[:], held.trainloader.dataset[:])
    del strategy, held
    gc.collect()
    assert len(copied.trainloader.dataset[:])
    with pytest.raises(SettingsError, match="N_CLASSES: must agree"):
        copied.setup(n_classes=4)
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    del copied
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())


def test_baselines_start_from_weights_of_a_bucket_too(data: Path, store: Store, tmp_path: Path) -> None:
    torch.save(small(data).model.state_dict(), tmp_path / "w.pth")
    store.put("w.pth", (tmp_path / "w.pth").read_bytes())
    results = small(data, pretrained=f"s3://{store.bucket}/w.pth", baselines=["majority"]).run()
    assert results["baselines"] == small(data, pretrained=tmp_path / "w.pth", baselines=["majority"]).run()["baselines"]


@pytest.mark.parametrize("name", ["run/1", "../up", "/tmp/run", "x" * 250, ""])
def test_an_output_name_is_a_file_name(data: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="output_name: must be a file name"):
        small(data, output_name=name)
    strategy = small(data)
    with pytest.raises(SettingsError, match="output_name: must be a file name"):
        strategy.run(output_name=name)


def test_another_output_name_keeps_the_network(data: Path) -> None:
    strategy = small(data)
    network = strategy.crowdlayer_net
    strategy.setup(output_name="other")
    assert strategy.crowdlayer_net is network
    assert strategy.output_name == "other"


def test_files_stay_those_that_were_named_when_the_program_goes_to_another_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    Path("removed.txt").write_text("0 0")
    strategy = small(data, "answers.json", path_remove="removed.txt")
    tasks = len(strategy.trainloader.dataset)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("answers.json").write_text('{"1": {"stranger": 0}}')
    strategy.setup(batch_size=8)
    assert (strategy.n_workers, len(strategy.trainloader.dataset)) == (small(data).n_workers, tasks)


def test_answers_are_a_path_or_those_of_the_data_set(data: Path) -> None:
    assert small(data, None).n_workers == small(data, data / "answers.json").n_workers
    votes: Any = {str(task): {"0": 0} for task in range(1000)}
    with pytest.raises(SettingsError, match="answers: must be the path of a file") as caught:
        small(data, votes)
    assert len(str(caught.value)) < 300


def test_peerannots_loop_lowers_the_rate_once_an_epoch(data: Path) -> None:
    strategy = small(data, n_epochs=4, milestones=[2])
    rates = []
    for _ in range(strategy.n_epochs):
        rates.append(strategy.optimizer.param_groups[0]["lr"])
        strategy.optimizer.step()
        strategy.scheduler.step()
        strategy.scheduler2.step()
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001])


def test_a_program_whose_numbers_are_double_trains_too(data: Path) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        results = small(data, data_augmentation=True, mixup=0.5).run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert results["best_epoch"] == 1


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
