"""COMPILE: torch.compile changes how fast a step is, and nothing that others see of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from crowdlayer.learning.devices import make_accelerator
from crowdlayer.settings import TrainingSettings
from tests.conftest import QUICK, run_job
from tests.test_trainer import Small, make, resumed, same


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    """How many graphs have been compiled so far."""
    return int(counters["stats"]["unique_graphs"])


def test_auto_compiles_nothing() -> None:
    make(n_epochs=1).fit()
    assert graphs() == 0


def test_nothing_of_a_frozen_network_is_compiled() -> None:
    make(n_epochs=1, freeze=True, compile="true").fit()
    assert graphs() == 0


def test_without_a_compiler_it_is_a_wrong_setting(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    places = {"TASKS": str(shapes), "OUTPUT": str(tmp_path / "out"), "WORKDIR": str(tmp_path / "work")}
    for arguments in ([], ["--check"]):
        done = run_job(*arguments, timeout=300, COMPILE="true", **places, **QUICK)
        assert done.code == 78
        assert done.last_line.endswith("COMPILE: true needs a C++ compiler, there is none")
        assert not (tmp_path / "work/data").exists()
    assert "data set" not in run_job(timeout=300, COMPILE="true", **places, **QUICK).stderr


@pytest.mark.slow
def test_each_shape_of_a_step_is_compiled_once_and_not_in_every_epoch() -> None:
    make(n_epochs=4, compile="true").fit()  # 33 tasks in steps of 7 and 6
    assert graphs() == 2


@pytest.mark.slow
def test_what_is_compiled_learns_and_keeps_its_names() -> None:
    trainer = make(n=90, n_epochs=8, compile="true")
    best = trainer.fit()
    assert best.classifier.keys() == Small(0.0).state_dict().keys()
    assert not any("_orig_mod" in name for name in trainer.learner.model.state_dict())
    eager = make(n=90, n_epochs=8).fit()
    assert best.score == pytest.approx(eager.score, rel=0.05)
    assert torch.allclose(best.crowd_layer["confusion"], eager.crowd_layer["confusion"], atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"mixup": 0.5, "ema": 0.9}], ids=["plain", "mixup and ema"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(options: dict[str, Any]) -> None:
    options = options | {"dropout": 0.3, "compile": "true"}
    whole = make(**options).fit()
    assert same(resumed(4, **options).fit(), whole)  # before the first step of the other shape


@pytest.mark.slow
def test_two_processes_compile_side_by_side(shapes: Path, tmp_path: Path) -> None:
    options = QUICK | {"MODEL": "squeezenet1_1", "IMG_SIZE": "32", "COMPILE": "true", "N_PROCESSES": "2"}
    done = run_job(timeout=900, TASKS=str(shapes), OUTPUT=str(tmp_path / "out"), **options)
    assert done.code == 0, done.stderr
    state = torch.load(tmp_path / "out/best_models/crowdlayer.pth", weights_only=True)
    assert not any("_orig_mod" in name for name in state["classifier"])


def test_the_choice_is_checked_where_the_device_is() -> None:
    make_accelerator(TrainingSettings(compile="true"))  # here there is a compiler
