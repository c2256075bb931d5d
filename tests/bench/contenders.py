"""What is measured: each contender sets itself up, then does one unit of work whenever it is asked.

    python -m tests.bench.contenders NAME '{"argument": …}'

A line on standard input asks for one unit; the answer is a JSON line with wall and CPU seconds. A contender has a
process of its own, so that its memory is its own, too.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from crowdlayer.learning.trainer import Trainer

Unit = Callable[[], object]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- training --------------------------------------------------------------------------------------------------------


def ours(
    tasks: str, size: int, model: str, augmented: bool = False, freeze: bool = False, compiled: str = "auto"
) -> Unit:
    """An epoch of the job's own trainer, validation not included."""
    from crowdlayer.learning.features import on_features
    from crowdlayer.learning.progress import Progress

    trainer = _trainer(tasks, size, model, data_augmentation=augmented, freeze=freeze, compile=compiled)
    for_good = ExitStack()
    for_good.enter_context(on_features(trainer, None, {}))
    progress = Progress()

    def epoch(_: ExitStack = for_good) -> None:  # which must not be collected: it would end the context
        progress.step = 0
        trainer.train_epoch(trainer.learner, trainer.train, progress)
        progress.epoch += 1
        _wait()

    return epoch


def limit(tasks: str, size: int, model: str) -> Unit:
    """An epoch of the same network on images that are a float tensor already, one label each, in a plain loop."""
    from crowdlayer.learning.classifier import build_classifier

    folders = Path(tasks, "train")
    n = sum(path.is_file() for path in folders.rglob("*"))
    n_classes = sum(path.is_dir() for path in folders.iterdir())
    torch.manual_seed(0)
    network = build_classifier(model, n_classes, size, False, False, "auto").to(DEVICE)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(n, 3, size, size, device=DEVICE)
    if DEVICE.type == "cuda":
        network = network.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, n_classes, (n,), device=DEVICE)
    parts = -(-n // 64)

    def epoch() -> None:
        network.train()
        for batch, truth in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
                loss = F.cross_entropy(network(batch), truth)
            torch.autograd.backward(loss)
            optimizer.step()
        _wait()

    return epoch


def evaluated(tasks: str, size: int, model: str, ours: bool) -> Unit:
    """The logits of all tasks: by the job's own trainer, or by a plain loop over a float tensor."""
    from crowdlayer.data.images import resident
    from crowdlayer.data.pixels import normalise

    trainer = _trainer(tasks, size, model)
    images = resident(trainer.train.dataset, DEVICE)
    if ours:
        return lambda: trainer.predict(images)
    network = trainer.classifier.eval()
    floats = normalise(images[:], DEVICE)
    dtype = torch.bfloat16 if trainer.accelerator.mixed_precision == "bf16" else torch.float32

    @torch.inference_mode()
    def loop() -> Tensor:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype == torch.bfloat16):
            return torch.cat([network(batch).float() for batch in torch.split(floats, 256)]).cpu()

    return loop


def _trainer(tasks: str, size: int, model: str, **options: Any) -> Trainer:
    from crowdlayer.data.layout import belongs, read_dataset
    from crowdlayer.learning.experiment import Experiment, load_images
    from crowdlayer.settings import DataSettings, TrainingSettings
    from crowdlayer.storage.sync import sync

    training = TrainingSettings(img_size=size, model=model, lr=0.001, **options)
    synced = sync(tasks, Path("unused"), belongs)
    answers = synced.root / "answers.json"
    data = read_dataset(synced.root, synced.digests, DataSettings(tasks=tasks), answers, None, 0)
    data, images = load_images(data, synced.root, training, 0, None)
    return Experiment(data, images, training, False).trainer()


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


# --- data path -------------------------------------------------------------------------------------------------------


def gathered(n: int, size: int, augmented: bool) -> Unit:
    """An epoch of batches of `n` images that are held."""
    from crowdlayer.answers import Answers
    from crowdlayer.data.images import CrowdLoader, resident

    images = resident(torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8), DEVICE)
    task = np.arange(n)
    loader = CrowdLoader(images, Answers(n, 10, task, task % 10, task % 10), 64, 0, augmented, DEVICE)

    def epoch() -> None:
        for _ in loader:
            pass
        _wait()

    return epoch


def decoded(tasks: str, size: int, kept: bool) -> Unit:
    """All images of train/, decoded; with `kept`, found where the first unit has left them."""
    from crowdlayer.data.decoding import decode_all
    from crowdlayer.storage.files import file_digest

    root = Path(tasks)
    names = sorted(str(path.relative_to(root)) for path in Path(tasks, "train").rglob("*") if path.is_file())
    digests = [file_digest(root / name) for name in names]
    folder = tempfile.TemporaryDirectory()

    def unit(folder: tempfile.TemporaryDirectory[str] = folder) -> None:
        decode_all(root, names, size, 1, Path(folder.name), ("train", digests) if kept else None)

    return unit


# --- the crowd layer -------------------------------------------------------------------------------------------------


def crowd_layer(n_workers: int, n_classes: int, update: bool, per_task: int = 3) -> Unit:
    """Ten steps on 64 tasks: forward, loss, backward, and with `update` the optimiser's step."""
    from crowdlayer.answers import Answers
    from crowdlayer.learning.aggregation import started
    from crowdlayer.learning.crowd_model import CrowdLoss, CrowdModel
    from crowdlayer.learning.optimization import make_optimizer
    from crowdlayer.settings import TrainingSettings

    settings = TrainingSettings(lr=0.01)
    nothing = np.empty(0, dtype=np.int64)
    layer = started(settings, Answers(64, n_workers, nothing, nothing, nothing), n_classes)
    model = CrowdModel(nn.Identity(), layer).to(DEVICE)
    optimizer = make_optimizer(model, settings)
    criterion = CrowdLoss("task")
    logits, task, worker, label = _answers(n_workers, n_classes, per_task)

    def steps() -> None:
        for _ in range(10):
            model.zero_grad()
            _, scores = model(logits, task, worker)
            torch.autograd.backward(criterion(scores, label, len(logits)))
            if update:
                optimizer.step()
        _wait()

    return steps


def dense_layer(n_workers: int, n_classes: int, update: bool, per_task: int = 3) -> Unit:
    """The same as peerannot computes it: the scores of all workers for every task, and -1 where none answered."""
    confusion = nn.Parameter(torch.eye(n_classes).repeat(n_workers, 1, 1).to(DEVICE))
    optimizer = torch.optim.SGD([confusion], lr=0.01, momentum=0.9, weight_decay=5e-4)
    logits, task, worker, label = _answers(n_workers, n_classes, per_task)
    table = torch.full((len(logits), n_workers), -1, device=DEVICE)
    table[task, worker] = label

    def steps() -> None:
        for _ in range(10):
            optimizer.zero_grad()
            scores = torch.einsum("ik,jkl->ijl", logits.softmax(1), confusion)
            torch.autograd.backward(F.cross_entropy(scores.reshape(-1, n_classes), table.view(-1), ignore_index=-1))
            if update:
                optimizer.step()
        _wait()

    return steps


def _answers(n_workers: int, n_classes: int, per_task: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    task = torch.arange(64).repeat_interleave(per_task)
    worker, label = torch.randint(0, n_workers, (len(task),)), torch.randint(0, n_classes, (len(task),))
    logits = torch.randn(64, n_classes, device=DEVICE, requires_grad=True)
    return logits, task.to(DEVICE), worker.to(DEVICE), label.to(DEVICE)


# --- sync ------------------------------------------------------------------------------------------------------------


def synced(location: str, again: bool, obstore: bool = True) -> Unit:
    """The data set of a bucket or an archive into a fresh folder, or, with `again`, into one that has it."""
    if not obstore:
        sys.modules |= {"obstore": None, "obstore.store": None}  # type: ignore[dict-item]  # as if not installed
    from crowdlayer.data.layout import belongs
    from crowdlayer.storage.sync import sync

    fresh = _fresh_folders()
    filled = next(fresh)
    if again:
        sync(location, filled, belongs)
    return lambda: sync(location, filled if again else next(fresh), belongs)


def one_by_one(location: str, n: int) -> Unit:
    """The first `n` objects, one after the other, as boto3's documentation has it."""
    import boto3

    bucket, _, prefix = location.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    fresh = _fresh_folders()

    def unit() -> None:
        folder = next(fresh)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        items = (item for page in pages for item in page["Contents"])
        for item in itertools.islice(items, n):
            body = client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
            (folder / item["Key"].replace("/", "-")).write_bytes(body)

    return unit


def aws(location: str) -> Unit:
    """AWS's command line."""
    return _command("aws", "s3", "sync", "--quiet", location)


def s5cmd(location: str) -> Unit:
    """The fastest of the command lines, with its own 256 requests at once."""
    return _command("s5cmd", "--endpoint-url", os.environ["AWS_ENDPOINT_URL"], "cp", f"{location}/*")


def rclone(location: str) -> Unit:
    """The other fast command line, told to ask nothing but what it must: the times of a store's own clock."""
    os.environ["RCLONE_CONFIG"] = os.devnull
    store = (":s3,provider=Other,env_auth=true:" + location.removeprefix("s3://"), "--s3-endpoint")
    options = ("--transfers", "32", "--checkers", "32", "--use-server-modtime", "--s3-force-path-style")
    return _command("rclone", "copy", *store, os.environ["AWS_ENDPOINT_URL"], *options)


def _command(*words: str) -> Unit:
    fresh = _fresh_folders()
    return lambda: subprocess.run([*words, f"{next(fresh)}/"], check=True, stdout=subprocess.DEVNULL)


def _fresh_folders() -> Iterator[Path]:
    """Empty folders without end; they are removed with the contender: on some disks that takes as long as the sync."""
    with tempfile.TemporaryDirectory() as below:
        for n in itertools.count():
            folder = Path(below, str(n))
            folder.mkdir()
            yield folder


# --- answers, start-up -----------------------------------------------------------------------------------------------


def answers(path: str, kept: bool) -> Unit:
    """The answers of a file, read and looked up."""
    from crowdlayer.answers import look_up
    from crowdlayer.answers.files import read_answers

    folder = tempfile.TemporaryDirectory()

    def unit(folder: tempfile.TemporaryDirectory[str] = folder) -> None:
        file = read_answers(Path(path), Path(folder.name, "answers-1.npz") if kept else None)
        look_up(file, [str(i) for i in range(10)])

    return unit


def started(arguments: list[str]) -> Unit:
    """Python with these arguments, from its start to its end."""
    return lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


MAKERS: tuple[Callable[..., Unit], ...] = (
    ours, limit, evaluated, gathered, decoded, crowd_layer, dense_layer, answers, synced, one_by_one, aws, s5cmd,
    rclone, started,
)  # fmt: skip
CONTENDERS = {maker.__name__: maker for maker in MAKERS}


def serve(unit: Unit) -> None:
    """Do a unit for every line that comes in."""
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), _cpu_seconds()
        unit()
        said = {"wall": time.perf_counter() - wall, "cpu": _cpu_seconds() - cpu, "peak": peak()}
        print(json.dumps(said), flush=True)


def _cpu_seconds() -> float:
    """Of this process and of those that it has started and waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(name: str, arguments: str) -> None:
    options: dict[str, Any] = json.loads(arguments)
    serve(CONTENDERS[name](**options))


if __name__ == "__main__":
    main(*sys.argv[1:])
