"""What a GPU alone can show (make gpu). Elsewhere a CPU shows the same of all the rest."""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from crowdlayer import load
from crowdlayer.data.images import CrowdLoader, on, resident
from crowdlayer.data.picture import decode
from crowdlayer.data.pixels import DRAWS, affine, augment, normalise
from crowdlayer.deployment.model_files import read_model
from crowdlayer.errors import DeviceMemoryError
from crowdlayer.learning.crowd_layer import WORKER_MODELS
from crowdlayer.learning.devices import device_memory, enough_memory, make_accelerator, precision
from crowdlayer.learning.progress import Best, Progress
from crowdlayer.learning.tensors import read_tensors
from crowdlayer.learning.trainer import Trainer
from crowdlayer.settings import TrainingSettings
from tests.conftest import QUICK, run_job
from tests.test_trainer import coloured, make, noisy, resumed, saved

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

CPU, GPU = torch.device("cpu"), torch.device("cuda")
EXACT: dict[str, Any] = {"mixed_precision": "no"}


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions without tf32: what is compared with a CPU must be computed as there."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def close(a: Best, b: Best, tolerance: float) -> bool:
    ours, theirs = (best.classifier | best.crowd_layer for best in (a, b))
    pairs = ((weight.double(), theirs[name].double()) for name, weight in ours.items())
    return all(torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in pairs)


# --- where it runs ---------------------------------------------------------------------------------------------------


def test_the_gpu_is_used_in_the_precision_that_it_has() -> None:
    assert make_accelerator(TrainingSettings()).device.type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    assert precision(TrainingSettings()) == ("bf16" if native else "no")
    assert precision(TrainingSettings(mixed_precision="fp16")) == "fp16"


def test_images_lie_on_the_device_where_there_is_room() -> None:
    trainer = make()
    device = trainer.accelerator.device
    there = resident(trainer.train.dataset, device)
    assert on(there, device)
    assert not on(trainer.train.dataset, device)
    assert torch.equal(there[:].cpu(), trainer.train.dataset[:])
    used, total = device_memory(device)
    assert 0 < used < total


def test_images_that_have_no_room_there_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crowdlayer.data.images.RESIDENT", 0.0)
    images, _ = coloured(33)
    assert resident(images, GPU) is images


@pytest.mark.parametrize("augmented", [False, True])
def test_batches_are_the_same_wherever_the_images_lie(augmented: bool) -> None:
    images, labels = coloured(33)
    answers = noisy(labels)
    wanted = list(CrowdLoader(images, answers, 8, 0, augmented, CPU))
    for held in (images, images.to(GPU)):
        batches = list(CrowdLoader(held, answers, 8, 0, augmented, GPU))
        assert len(batches) == len(wanted)
        for batch, other in zip(batches, wanted, strict=True):
            assert batch.images.is_contiguous(memory_format=torch.channels_last) or augmented
            torch.testing.assert_close(batch.images.cpu(), other.images, rtol=0, atol=1e-4)
            for part in ("task", "worker", "label"):
                assert torch.equal(getattr(batch, part).cpu(), getattr(other, part))
            assert (batch.n_tasks, batch.n_answers) == (other.n_tasks, other.n_answers)


def test_augmentation_is_that_of_a_cpu() -> None:
    """Also of an image so large that places known to a thousandth alone, as tf32 knows them, would show."""
    pixels = torch.randint(0, 256, (16, 14, 14, 3), dtype=torch.uint8).repeat_interleave(16, 1).repeat_interleave(16, 2)
    theta = affine(torch.rand(16, DRAWS), torch.rand(16) + 0.5)
    ours, theirs = augment(normalise(pixels, GPU), theta.to(GPU)), augment(normalise(pixels, CPU), theta)
    assert (ours.cpu() - theirs).abs().mean() < 1e-4


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(WORKER_MODELS))
def test_a_crowd_layer_is_as_exact_as_on_a_cpu(name: str) -> None:
    """Whatever autocast says: the workers' gradients are small."""
    torch.manual_seed(0)
    layer = WORKER_MODELS[name](50, 10)
    for table in layer.parameters():
        table.data += 0.1 * torch.randn_like(table)
    logits, task = torch.randn(64, 10), torch.arange(64).repeat_interleave(3)
    worker, label = torch.randint(0, 50, (192,)), torch.randint(0, 10, (192,))
    found = []
    for device, dtype in ((CPU, torch.float64), (GPU, torch.float32)):
        there = copy.deepcopy(layer).to(device, dtype)
        given = logits.to(device, dtype).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=device == GPU):
            scores = there(given, task.to(device), worker.to(device))
        F.cross_entropy(scores, label.to(device)).backward()  # type: ignore[no-untyped-call]
        gradients = [given.grad, *(table.grad for table in there.parameters())]
        found.append([part.cpu().double() for part in (scores.detach(), *(g for g in gradients if g is not None))])
    for exact, ours in zip(*found, strict=True):
        assert (exact - ours).norm() <= 1e-5 * exact.norm()


LEARNT: list[dict[str, Any]] = [
    {},
    {"mixup": 0.5, "ema": 0.9, "crowd_layer": "stochastic", "crowd_start": "dawid-skene", "crowd_warmup": 1},
    {"optimizer": "adamw", "lr": 0.02, "scheduler": "cosine", "scale": 0.01, "regularizer": "geo-w"},
    {"crowd_updates": "rows", "optimizer": "adam", "lr": 0.02, "loss_reduction": "answer"},
    {"scale": 0.01, "regularizer": "identity", "guard": True},
    {"scale": 0.01, "regularizer": "pooled", "select_by": "calibrated_loss"},
    {"scale": 0.01, "regularizer": "trace", "crowd_layer": "scale+bias"},
    {"scale": 0.01, "regularizer": "geo-f", "mixed_precision": "fp16"},
    {"freeze": True, "select_by": "accuracy"},
]


@pytest.mark.parametrize("options", LEARNT, ids=str)
@pytest.mark.parametrize("with_truth", [True, False], ids=["val", "held out"])
def test_it_learns_with_every_setting(options: dict[str, Any], with_truth: bool) -> None:
    if not with_truth and options.get("select_by") == "accuracy":
        pytest.skip("accuracy needs true labels")
    trainer = make(n=90, n_epochs=6, with_truth=with_truth, **options)
    best = trainer.fit()
    assert trainer.history.train_loss[-1] < trainer.history.train_loss[0]
    assert all(weight.device == CPU for weight in best.classifier.values())
    trainer.load(best)
    images, labels = coloured(30, seed=5)
    assert (trainer.predict(images).argmax(1) == labels).float().mean() > (0.5 if options.get("freeze") else 0.8)


def recorded(trainer: Trainer) -> int:
    """How many graphs there are."""
    assert trainer.learner.graphs is not None
    return len(trainer.learner.graphs)


def epochs(trainer: Trainer, n: int = 2) -> Trainer:
    for epoch in range(n):
        trainer.train_epoch(trainer.learner, trainer.train, Progress(epoch))
    return trainer


RECORDED: list[dict[str, Any]] = [{}, {"dropout": 0.3, "mixup": 0.5, "ema": 0.9}, {"loss_reduction": "answer"}]


@pytest.mark.parametrize("options", [EXACT | options for options in RECORDED], ids=str)
def test_graphs_learn_what_single_kernels_learn(options: dict[str, Any]) -> None:
    """Statistics of batch norm included, which trial runs before the recording change, and the draws of dropout."""
    graphs, eager = (epochs(make(compile=how, **options), 3) for how in ("auto", "false"))
    assert recorded(graphs) == 2  # 33 tasks in steps of 7 and 6, which are tried three times each
    assert eager.learner.graphs is None
    for name, weight in eager.learner.evaluated.state_dict().items():
        torch.testing.assert_close(graphs.learner.evaluated.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32")  # torch's own, while it compiles
def test_compiled_code_learns_what_single_kernels_learn() -> None:
    compiled, eager = (epochs(make(compile=how, **EXACT), 3) for how in ("true", "false"))
    assert recorded(compiled) == 2
    for name, weight in eager.learner.model.state_dict().items():
        torch.testing.assert_close(compiled.learner.model.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


VARYING: list[dict[str, Any]] = [
    {"crowd_updates": "rows"},
    {"freeze": True},
    {"scale": 0.01, "regularizer": "geo-w"},
]


@pytest.mark.parametrize("options", VARYING, ids=str)
def test_what_depends_on_the_step_is_not_recorded(options: dict[str, Any]) -> None:
    assert make(**options).learner.graphs is None


def test_graphs_are_forgotten_when_the_training_is_over() -> None:
    trainer = make()
    trainer.fit()
    assert recorded(trainer) == 0


def test_what_cannot_be_recorded_is_trained_as_it_is() -> None:
    """A network that looks at its own numbers, as some of other people's do."""

    class Looking(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.detach().sum()) == 0 else 1 * x

    options = EXACT | {"dropout": 0.3}
    trainer = make(**options)
    trainer.classifier.features.append(Looking())  # type: ignore[operator, union-attr]
    epochs(trainer)
    assert recorded(trainer) == 0
    eager = epochs(make(compile="false", **options))
    for name, weight in eager.learner.model.state_dict().items():
        torch.testing.assert_close(trainer.learner.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Refuse what makes the processor wait for the GPU."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


UNWATCHED: list[dict[str, Any]] = [
    {},
    {"mixup": 0.5, "ema": 0.9, "crowd_layer": "stochastic"},
    {"optimizer": "adam", "lr": 0.01, "scale": 0.01, "regularizer": "identity"},
    {"scale": 0.01, "regularizer": "pooled"},
]


@pytest.mark.parametrize("options", UNWATCHED, ids=str)
@pytest.mark.parametrize("there", [True, False], ids=["images on the device", "images on the host"])
def test_no_step_waits_for_the_gpu(options: dict[str, Any], there: bool) -> None:
    trainer = make(**options)
    images = trainer.train.dataset[:]
    device = trainer.accelerator.device
    held = resident(images, device) if there else images
    trainer.train = CrowdLoader(held, trainer.train.answers, 8, 0, True, device)
    trainer.train_epoch(trainer.learner, trainer.train, Progress())  # states of optimisers, constants
    epochs(trainer, 3)
    assert recorded(trainer) == 2
    trainer.learner.train()
    with nobody_waits():
        for batch in trainer.train.batches(3):
            torch.manual_seed(1)
            logits, shown, _ = trainer.learner.step(batch, False)
            trainer.guard.see(logits, batch.task, shown)


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [EXACT, {"mixup": 0.5, "ema": 0.9}, {"mixed_precision": "fp16"}], ids=str)
def test_a_run_that_was_stopped_goes_on(options: dict[str, Any]) -> None:
    options = {"dropout": 0.3, "lr": 0.01} | options
    expected = make(**options).fit()
    best = resumed(6, **options).fit()
    assert close(best, expected, 1e-4)
    assert best.epoch == expected.epoch


def test_a_checkpoint_can_be_read_where_there_is_no_gpu() -> None:
    trainer = make(n_epochs=1)
    trainer.fit()
    model = read_tensors(saved(trainer))["model"]
    assert {tensor.device for tensor in model.values()} == {CPU}


def test_too_little_memory_is_said_with_the_settings_to_lower() -> None:
    settings = TrainingSettings(batch_size=512)
    said = r"BATCH_SIZE=512 .* lower one of them; .* more were asked for"
    with pytest.raises(DeviceMemoryError, match=said), enough_memory(settings):
        torch.empty(2**46, dtype=torch.uint8, device=GPU)


# --- jobs ------------------------------------------------------------------------------------------------------------


def results(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "results/crowdlayer.json").read_text())
    return document


def test_a_job_comes_to_what_it_comes_to_on_a_cpu(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = QUICK | {"MODEL": "resnet18", "TASKS": str(shapes), "MIXED_PRECISION": "no", "BASELINES": "majority"}
    settings |= {"LR": "0.0001"}  # at 0.01 two CPUs differ by a hundredth after two steps
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    found = []
    for name, visible in (("gpu", None), ("cpu", "")):
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        done = run_job(timeout=300, OUTPUT=str(tmp_path / name), **settings)
        assert done.code == 0, done.stderr
        found.append(results(tmp_path / name))
    gpu, cpu = found
    assert [name.startswith("cuda") for name in gpu["job"]["devices"]] == [True]
    assert cpu["job"]["devices"] == ["cpu"]
    np.testing.assert_allclose(gpu["train_loss"][0], cpu["train_loss"][0], rtol=1e-3)
    np.testing.assert_allclose(gpu["train_loss"][1], cpu["train_loss"][1], rtol=1e-2)  # two GPUs differ by 2e-3
    best = [torch.load(tmp_path / name / "best_models/crowdlayer.pth", weights_only=True) for name in ("gpu", "cpu")]
    torch.testing.assert_close(best[0]["confusion"], best[1]["confusion"], rtol=1e-3, atol=1e-3)


def test_what_it_has_learnt_predicts_on_either_device(shapes: Path, tmp_path: Path) -> None:
    done = run_job(timeout=300, TASKS=str(shapes), OUTPUT=str(tmp_path), FREEZE="true", **QUICK)
    assert done.code == 0, done.stderr
    images = sorted((shapes / "test").rglob("*.png"))
    there = load(tmp_path / "results/crowdlayer.json").predict_proba(images)
    pixels = torch.from_numpy(np.stack([decode(image, 16) for image in images]))
    with torch.inference_mode():
        here = read_model(tmp_path / "best_models/crowdlayer")[0](pixels)
    np.testing.assert_allclose(there, here, atol=0.01)


def test_more_processes_than_gpus_are_a_wrong_setting(shapes: Path, tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    done = run_job(timeout=300, TASKS=str(shapes), OUTPUT=str(tmp_path), N_PROCESSES=str(count + 1), **QUICK)
    assert done.code == 78
    assert f"N_PROCESSES: must be at most {count}, the number of visible GPUs, got {count + 1}" in done.last_line


def test_a_process_of_torchruns_trains_with_nccl(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in (torchrun | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    done = run_job(timeout=300, TASKS=str(shapes), OUTPUT=str(tmp_path), **QUICK)
    assert done.code == 0, done.stderr
    assert results(tmp_path)["job"]["devices"][0].startswith("cuda:0 ")


def test_the_check_says_what_the_job_will_run_on(shapes: Path, tmp_path: Path) -> None:
    done = run_job("--check", timeout=300, TASKS=str(shapes), OUTPUT=str(tmp_path), **QUICK)
    assert done.code == 0, done.stderr
    assert torch.cuda.get_device_name() in done.stdout + done.stderr
