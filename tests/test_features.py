"""FREEZE=true: a frozen network is run once per image."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from crowdlayer import Crowdlayer
from crowdlayer.data.held import Held
from crowdlayer.errors import StoreError
from crowdlayer.learning.features import features, on_features
from crowdlayer.learning.progress import Best
from crowdlayer.learning.trainer import Trainer
from crowdlayer.machine import memory
from tests.crowds import write_shapes
from tests.gang import together
from tests.test_trainer import Small, coloured, make, same


def fit(trainer: Trainer) -> Best:
    with on_features(trainer, None, {}):
        return trainer.fit()


def test_the_frozen_part_sees_each_image_once_whatever_the_epochs() -> None:
    trainer = make(freeze=True, n_epochs=5)
    seen: list[int] = []

    def count(_: nn.Module, given: tuple[Tensor], __: Tensor) -> None:
        seen.append(len(given[0]))

    trainer.classifier.get_submodule("features").register_forward_hook(count)
    fit(trainer)
    assert sum(seen) == 33 + 12 + 2  # train, validation, and the two of the question whether the head is last


@pytest.mark.parametrize("with_truth", [True, False])
def test_it_learns_what_it_learns_from_images(with_truth: bool) -> None:
    on_images = make(freeze=True, dropout=0.5, with_truth=with_truth)
    ours, theirs = fit(make(freeze=True, dropout=0.5, with_truth=with_truth)), on_images.fit()
    assert ours.epoch == theirs.epoch
    torch.testing.assert_close(ours.crowd_layer["confusion"], theirs.crowd_layer["confusion"], atol=1e-5, rtol=1e-4)
    assert list(ours.classifier) == list(theirs.classifier)
    for name, tensor in theirs.classifier.items():
        torch.testing.assert_close(ours.classifier[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("mixup", "ema"), [(0.5, 0.0), (0.0, 0.5)])
def test_mixed_images_and_averaged_weights_take_the_long_way(mixup: float, ema: float) -> None:
    ours, theirs = fit(make(freeze=True, mixup=mixup, ema=ema)), make(freeze=True, mixup=mixup, ema=ema).fit()
    assert same(ours, theirs)


def test_a_whole_run_sees_each_image_once(tmp_path: Path) -> None:
    """The evaluation of the chosen epoch reads what the training has computed; the test images are new to it."""
    data = write_shapes(tmp_path / "data", n_train=24, n_val=8, n_test=10)
    options: dict[str, Any] = {"img_size": 16, "freeze": True, "verbose": False}
    job = Crowdlayer(data, data / "answers.json", "shufflenet_v2_x0_5", 3, "sgd", 3, **options)
    seen: list[int] = []

    def count(module: nn.Module, given: tuple[Tensor], _: Tensor) -> None:
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            seen.append(len(given[0]))

    with register_module_forward_hook(count):
        job.run()
    assert sum(seen) == 24 + 8 + 10 + 2


def test_afterwards_the_classifier_takes_images_again() -> None:
    trainer = make(freeze=True)
    images = trainer.train.dataset
    best = fit(trainer)
    trainer.load(best)
    assert trainer.train.dataset is images
    assert trainer.predict(coloured(5)[0]).shape == (5, 3)


class Doubled(Small):
    """A network that goes on after its head, as squeezenet does."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("why", ["not frozen", "augmented", "goes on after its head"])
def test_where_features_would_change_or_not_suffice_it_trains_on_images(why: str) -> None:
    options: dict[str, Any] = {"freeze": why != "not frozen"}
    trainer = make(**options)
    trainer.train.augmented = why == "augmented"
    if why == "goes on after its head":
        trainer.learner.model.classifier = Doubled()
    images = trainer.train.dataset
    with on_features(trainer, None, {}):
        assert trainer.train.dataset is images


def test_features_leave_room_on_the_disk_for_the_checkpoints(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a run whose decoded images have filled its disk ends at its first, and so does the next start."""
    trainer = make(freeze=True)
    images, usage = trainer.train.dataset, shutil.disk_usage(tempfile.gettempdir())
    needed = (33 + 12) * 16 * 4
    for free, fit in ((1000 + needed - 1, False), (1000 + needed, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with on_features(trainer, None, {}, 1000):
            assert (trainer.train.dataset is not images) == fit
    assert caplog.text.count("features find no room in /") == 1


def test_features_that_lie_in_memory_leave_half_of_it_to_the_training(
    tmp_path: Path, cgroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded images do; features beyond it had the kernel end the container, at each start."""
    trainer = make(freeze=True)
    images, needed = trainer.train.dataset, (33 + 12) * 16 * 4
    monkeypatch.setattr(memory, "MOUNTS", tmp_path / "mounts")
    (cgroup / "memory.current").write_text("0")
    for kind, free, fit in (("tmpfs", 2 * needed - 1, False), ("tmpfs", 2 * needed, True), ("ext4", needed, True)):
        (tmp_path / "mounts").write_text(f"a {tmp_path} {kind} rw 0 0\n")
        (cgroup / "memory.max").write_text(str(free))
        with on_features(trainer, tmp_path, {}):
            assert (trainer.train.dataset is not images) == fit


def features_of_seven(folder: Path) -> Tensor:
    return features(make(freeze=True, batch_size=8), coloured(33)[0], folder)[:].clone()


def test_several_processes_share_the_work_and_have_the_same_bits(tmp_path: Path) -> None:
    alone = features_of_seven(tmp_path)
    first, second = together(2, features_of_seven, tmp_path)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone)
    assert list(tmp_path.iterdir()) == []


def test_what_memory_cannot_hold_is_the_same_features(tmp_path: Path, cgroup: Path) -> None:
    enough = features_of_seven(tmp_path)
    (cgroup / "memory.max").write_text("1000")
    (cgroup / "memory.current").write_text("1000")
    found = features(make(freeze=True, batch_size=8), coloured(33)[0], tmp_path)
    assert isinstance(found, Held)
    assert found.mapping is not None
    assert torch.equal(found[:], enough)
    rows = torch.tensor([32, 0, 7, 7])
    assert torch.equal(found[rows], enough[rows])


def test_a_disk_that_is_full_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It had been a signal that ends the process, when the memory of a hole was written to."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("r+b", buffering=0))  # noqa: SIM115
    with pytest.raises(StoreError, match=rf"{tmp_path}: the features of 33 images: No space left on device"):
        features_of_seven(tmp_path)
