"""What a job hands to its processes, and they to it, is what they take; and nothing of it is run."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crowdlayer.answers import Answers, Ints
from crowdlayer.data.dataset import CrowdImages, Dataset, LabelledImages
from crowdlayer.learning.spool import Identity, Spool
from crowdlayer.settings import Settings
from crowdlayer.storage.handover import hand, take
from crowdlayer.training import Plan


@dataclass(frozen=True)
class Told:
    """Of everything one."""

    tensors: dict[str, torch.Tensor]
    none: torch.Tensor | None
    labels: Ints
    figures: list[float | None]
    also: dict[str, Any]


def test_tensors_and_figures_arrive_to_the_bit(tmp_path: Path) -> None:
    turned = torch.rand(2, 3, dtype=torch.float64).T
    tensors = {"turned": turned, "one": torch.tensor(3), "no": torch.empty(0, 4), "flags": torch.tensor([True])}
    told = Told(tensors, None, np.arange(3), [0.1, float("inf"), None], {"gain": {"points": 1 / 3}})
    hand(told, tmp_path / "told.npz")
    taken = take(tmp_path / "told.npz", Told)
    assert taken.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert taken.tensors[name].dtype == tensor.dtype
        assert torch.equal(taken.tensors[name], tensor)
    assert taken.labels.tolist() == [0, 1, 2]
    assert (taken.none, taken.figures, taken.also) == (None, told.figures, told.also)


@pytest.mark.parametrize("pretrained", [True, "s3://bucket/weights.pth"])
def test_a_plan_arrives_whole(tmp_path: Path, pretrained: bool | str) -> None:
    """With settings of every kind, and the name of a file that is no UTF-8."""
    settings = Settings(
        tasks="s3://bucket/data", pretrained=pretrained, classes=("a", "b"), milestones=(2, 4), num_workers=3,
        baselines=("majority",), sweep=({"lr": 0.1},), sweep_index=0,
    )  # fmt: skip
    answers = Answers(2, 1, np.array([0, 1]), np.array([0, 0]), np.array([1, 0]))
    crowd = CrowdImages(["train/\udcff-0.png", "train/x-1.png"], ["0", "1"], answers, np.array([-1, 1]))
    test = LabelledImages(["test/a/x.png"], np.array([0]))
    dataset = Dataset("birds", ["a", "b"], ["w"], crowd, crowd, None, test, {"broken_images": 0})
    spool = Spool(tmp_path / "spool", Identity(settings.model_dump(mode="json"), "digest"), 7)
    weights = None if pretrained is True else tmp_path / "weights"
    plan = Plan(settings, dataset, tmp_path, {"train/x-1.png": "0" * 64}, weights, tmp_path, spool, {"run": tmp_path})
    hand(plan, tmp_path / "plan.npz")
    taken = take(tmp_path / "plan.npz", Plan)
    assert taken.settings == settings.model_copy(update={"sweep": ()})  # what other runs have concerns nobody here
    assert (taken.root, taken.digests, taken.weights, taken.spool, taken.resume) == (
        plan.root, plan.digests, plan.weights, plan.spool, plan.resume,
    )  # fmt: skip
    assert taken.pretrained == plan.pretrained
    assert taken.dataset.train.names == crowd.names
    assert taken.dataset.val is None
    assert taken.dataset.test is not None
    assert taken.dataset.answers.label.tolist() == [1, 0, 1, 0]


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "done",))

    np.savez(tmp_path / "plan.npz", np.array([Evil()], dtype=object))
    (tmp_path / "plain").write_bytes(pickle.dumps(Evil()))
    for name in ("plan.npz", "plain"):
        with pytest.raises(ValueError, match="pickle"):
            take(tmp_path / name, Plan)
    assert not (tmp_path / "done").exists()


def test_what_nobody_said_how_to_write_is_not_handed_on(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="object: is not to be handed on"):
        hand(object(), tmp_path / "told.npz")
