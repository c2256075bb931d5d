"""How fast: training, data path, crowd layer, answers, sync, start-up, growth, beside what each is held against.

    python -m tests.bench                                    # all of it, minutes to an hour
    python -m tests.bench --only crowd,answers --rounds 5 --json bench.json
    python -m tests.bench --peerannot PYTHON                 # an interpreter that has peerannot, for its class
    python -m tests.bench --only training --where "32 px"    # a part, where a GPU is lent by the minute

Contenders are processes (`contenders.py`) that do one unit of work in turn, round after round, so that what else the
machine does meets all alike. Shown are medians over the rounds, the first left out (two on a GPU), and the most
memory a contender had. On a busy machine CPU seconds can be trusted, and ratios of them; wall seconds cannot.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench.data import many_answers, renumbered
from tests.bench.stores import filled
from tests.conftest import ROOT, SHARED


@dataclass(frozen=True)
class Row:
    """One contender in one condition; seconds per unit, bytes."""

    group: str
    condition: str
    contender: str
    wall: float
    cpu: float
    peak: int
    per_second: float | None = None
    """Things done per second, where a unit has a number of them: of CPU time, on a GPU of the clock's."""
    walls: list[float] = field(default_factory=list)
    """Of the rounds, in their order: contenders of one round are to be held against each other."""


@dataclass(frozen=True)
class Contender:
    """A process that does one unit of work whenever it is asked."""

    name: str
    command: list[str]
    share: float = 1
    """How much of a unit it does, where all of it would take too long; its seconds are shown for a whole one."""

    @contextmanager
    def ready(self, threads: int) -> Iterator[Callable[[], dict[str, float]]]:
        environment = dict(os.environ) | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        assert process.stdin is not None
        assert process.stdout is not None
        ask, answer = process.stdin, process.stdout

        def unit() -> dict[str, float]:
            print("go", file=ask, flush=True)
            said: dict[str, float] = json.loads(answer.readline())
            return said | {what: said[what] / self.share for what in ("wall", "cpu")}

        try:
            yield unit
        finally:
            ask.close()
            process.wait()


def contender(name: str, maker: str, **options: Any) -> Contender:
    """One of `contenders.py`."""
    return Contender(name, [sys.executable, "-m", "tests.bench.contenders", maker, json.dumps(options)])


@dataclass
class Bench:
    """The rows so far, and how to get more."""

    rounds: int
    threads: int
    gpu: bool
    peerannot: str | None
    folder: Path
    plot: Path
    rows: list[Row]
    where: str = ""
    without: Sequence[str] = ()

    def race(self, group: str, condition: str, contenders: list[Contender], count: int = 0) -> None:
        """Let the contenders do a unit in turn; `count` is how many things a unit has.

        The first round is left out, and on a GPU the second, in which the first graph of a step is recorded anew.
        """
        if self.where not in condition:
            return
        contenders = [one for one in contenders if one.name not in self.without]
        unready = 2 if self.gpu else 1
        with ExitStack() as stack:
            units = [(one.name, stack.enter_context(one.ready(self.threads))) for one in contenders]
            rounds = [[unit() for _, unit in units] for _ in range(self.rounds + unready)][unready:]
        for at, (name, _) in enumerate(units):
            wall, cpu = (statistics.median(said[at][what] for said in rounds) for what in ("wall", "cpu"))
            peak = int(max(said[at]["peak"] for said in rounds))
            walls = [said[at]["wall"] for said in rounds]
            seconds = wall if self.gpu else cpu
            self.add(
                Row(group, condition, name, wall, cpu, peak, count / seconds if count and seconds else None, walls)
            )

    def add(self, row: Row) -> None:
        self.rows.append(row)
        rate = "" if row.per_second is None else f"{row.per_second:>12,.0f}/s"
        print(
            f"{row.group:<10} {row.condition:<34} {row.contender:<22} {1e3 * row.wall:>10.1f} {1e3 * row.cpu:>10.1f} "
            f"{row.peak / 2**20:>8.0f} {rate}",
            flush=True,
        )


LOADERS = 16
"""Processes that load peerannot's images beside a GPU."""

# --- the groups ------------------------------------------------------------------------------------------------------


LABELME, CIFAR = SHARED / "data" / "labelme", SHARED / "data" / "cifar10n.zip"
ON_A_CPU = (("labelme", LABELME, 700, 64, "resnet18"), ("cifar10n", CIFAR, 1000, 32, "resnet18"))
ON_A_GPU = (  # each photo several times: an epoch must last longer than it takes to begin one
    ("cifar10n", CIFAR, 5600, 32, "resnet18"),
    ("labelme x 8", LABELME, 5600, 64, "resnet18"),
    ("labelme x 4", LABELME, 2800, 224, "resnet18"),
    ("labelme x 4", LABELME, 2800, 224, "resnet50"),
)


def training(bench: Bench) -> None:
    """An epoch, plain and augmented, and an evaluation: ours, peerannot's class, and the limit."""
    for name, source, n, size, model in ON_A_GPU if bench.gpu else ON_A_CPU:
        tasks = renumbered(source, bench.folder / f"{name.split()[0]}-{n}", n)
        what = {"tasks": str(tasks), "size": size, "model": model}
        contenders = [contender("crowdlayer", "ours", **what), contender("limit", "limit", **what)]
        if bench.gpu:
            contenders.insert(1, contender("crowdlayer, eager", "ours", compiled="false", **what))
            contenders.insert(2, contender("crowdlayer, compiled", "ours", compiled="true", **what))
            contenders.insert(3, contender("augmented", "ours", augmented=True, **what))
        if model == "resnet18":
            contenders += _theirs(bench, **what)
        bench.race("training", f"{model} {name} {size} px", contenders, n)
        contenders = [
            contender(name, "evaluated", ours=name == "crowdlayer", **what) for name in ("crowdlayer", "limit")
        ]
        bench.race("evaluation", f"{model} {name} {size} px", contenders, n)


def frozen(bench: Bench) -> None:
    """FREEZE=true on LabelMe at 64 px: the first epoch, which is left out, has computed the features."""
    tasks = renumbered(LABELME, bench.folder / "labelme", 700)
    what = {"tasks": str(tasks), "size": 64, "model": "resnet18", "freeze": True}
    contenders = [contender("crowdlayer", "ours", **what), *_theirs(bench, **what)]
    bench.race("frozen", "labelme 64 px", contenders, sum(path.is_file() for path in (tasks / "train").rglob("*")))


def data(bench: Bench) -> None:
    """Batches of images that are held, with and without augmentation; and decoding, once and found again."""
    tasks = renumbered(LABELME, bench.folder / "labelme-once", 700)
    for size, n in ((32, 4096), (64, 2048), (224, 256)):
        plain, augmented = ({"n": n, "size": size, "augmented": augmented} for augmented in (False, True))
        contenders = [contender("held", "gathered", **plain), contender("held, augmented", "gathered", **augmented)]
        bench.race("data", f"batches of 64, {size} px", contenders, n)
    for size in (64, 224):
        once, again = ({"tasks": str(tasks), "size": size, "kept": kept} for kept in (False, True))
        contenders = [contender("decoded", "decoded", **once), contender("found in WORKDIR", "decoded", **again)]
        bench.race("data", f"256 px JPEG to {size} px", contenders, 700)


def crowd(bench: Bench) -> None:
    """Ten steps of the crowd layer alone on 64 tasks with 3 answers each: ours, and all workers as peerannot has it."""
    for n_workers, n_classes, dense in (
        (59, 8, True), (2_500, 10, True), (2_500, 100, True), (10_000, 10, True), (100_000, 10, True),
        (1_000_000, 10, False), (10_000, 100, False),
    ):  # fmt: skip
        for update in (False, True):
            what = {"n_workers": n_workers, "n_classes": n_classes, "update": update}
            contenders = [contender("observed answers", "crowd_layer", **what)]
            contenders += [contender("all workers", "dense_layer", **what)] if dense else []
            condition = f"{n_workers} × {n_classes}, {'with' if update else 'without'} update"
            bench.race("crowd", condition, contenders, 10)


def answers(bench: Bench) -> None:
    """10^7 answers to 10^6 tasks by 20,000 workers: 400 MB of JSON, read and looked up; and found again."""
    path = many_answers(bench.folder / "answers.json", 10**6, 10, 20_000)
    what = {"path": str(path)}
    contenders = [contender("read", "answers", kept=False, **what), contender("kept", "answers", kept=True, **what)]
    bench.race("answers", f"10^7 answers, {path.stat().st_size / 1e6:.0f} MB", contenders, 10**7)


def start(bench: Bench) -> None:
    """The process from its start to its end."""
    starts = {
        "--help": ["entrypoint.py", "--help"],
        "a wrong setting": ["-c", "import crowdlayer.settings as s; s.DataSettings.model_validate({'tasks': 'x'})"],
        "import torch": ["-c", "import torch"],
        "all but the data": ["-c", "import crowdlayer.job"],
    }
    bench.race("start-up", "", [contender(name, "started", arguments=given) for name, given in starts.items()])


def sync(bench: Bench, n: int = 2000) -> None:
    """A bucket of objects of 2.4 KB: a tenth one by one; by other tools where they are; ours, again, as archive."""
    with filled(n) as (tree, archive):
        slow = contender("one by one", "one_by_one", location=tree, n=n // 10)
        contenders = [
            replace(slow, share=0.1),
            *(contender(tool, tool, location=tree) for tool in ("aws", "s5cmd", "rclone") if shutil.which(tool)),
            contender("crowdlayer", "synced", location=tree, again=False, obstore=False),
            contender("crowdlayer[fast]", "synced", location=tree, again=False),
            contender("nothing changed", "synced", location=tree, again=True),
            contender("one archive", "synced", location=archive, again=False),
        ]
        bench.race("sync", f"{n} objects of 2.4 KB", contenders, n)


def growth(bench: Bench) -> None:
    """Seconds per epoch and step as images, answers and workers grow: linear, linear, flat."""
    points: dict[str, list[tuple[int, float]]] = {"images": [], "answers": [], "workers": []}
    for n in (10**3, 10**4, 10**5, 10**6):
        condition = f"{n} images of 8 px, an epoch"
        bench.race("growth", condition, [contender("images", "gathered", n=n, size=8, augmented=False)], n)
        points["images"].append((n, bench.rows[-1].cpu))
        path = many_answers(bench.folder / f"answers-{n}.json", n // 10, 10, 100)
        bench.race("growth", f"{n} answers", [contender("answers", "answers", path=str(path), kept=False)], n)
        points["answers"].append((n, bench.rows[-1].cpu))
        what = {"n_workers": n, "n_classes": 10, "update": True}
        bench.race("growth", f"{n} workers, ten steps", [contender("workers", "crowd_layer", **what)], 10)
        points["workers"].append((n, bench.rows[-1].cpu))
    plot(points, bench.plot)


def plot(points: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """CPU seconds over the number of things, both logarithmic, as SVG; a dotted line is proportional growth."""
    width, height, pad = 480, 320, 50
    everything = [(np.log10(n), np.log10(seconds)) for line in points.values() for n, seconds in line]
    low, high = np.floor(np.min(everything, axis=0)), np.ceil(np.max(everything, axis=0))
    scale = (np.array([width, height]) - 2 * pad) / (high - low)

    def at(x: float, y: float) -> str:
        right, up = (np.array([x, y]) - low) * scale + pad
        return f"{right:.1f},{height - up:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for x in range(int(low[0]), int(high[0]) + 1):
        right, down = at(x, low[1]).split(",")
        parts.append(f'<text x="{right}" y="{float(down) + 16}" text-anchor="middle">10^{x}</text>')
    for y in range(int(low[1]), int(high[1]) + 1):
        right, down = at(low[0], y).split(",")
        parts.append(f'<text x="{float(right) - 6}" y="{down}" text-anchor="end">10^{y} s</text>')
    for colour, (name, line) in zip(("#1b6ca8", "#c7522a", "#3a7d44"), points.items(), strict=True):
        ends = [at(np.log10(n), np.log10(seconds)) for n, seconds in line]
        first, last = line[0], line[-1]
        proportional = at(np.log10(last[0]), np.log10(first[1] * last[0] / first[0]))
        parts.append(f'<polyline points="{" ".join(ends)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<path d="M{ends[0]} L{proportional}" stroke="{colour}" stroke-dasharray="2 4"/>')
        right, down = ends[-1].split(",")
        parts.append(f'<text x="{right}" y="{float(down) - 5}" text-anchor="end" fill="{colour}">{name}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")
    print(f"plot: {path}")


def _theirs(bench: Bench, **options: Any) -> list[Contender]:
    if bench.peerannot is None:
        return []
    script = str(ROOT / "tests" / "bench" / "theirs.py")
    loaders = LOADERS if bench.gpu else 0  # on a CPU they take from the network what they give
    return [Contender("peerannot", [bench.peerannot, script, json.dumps(options | {"loaders": loaders})])]


GROUPS = {group.__name__: group for group in (training, frozen, data, crowd, answers, start, sync, growth)}


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    names = ("torch", "torchvision", "accelerate", "numpy", "pillow", "msgspec", "boto3", "obstore")
    return {
        "cpu": cpu, "cpus": os.cpu_count(), "threads": threads, "gpu": gpu, "load": os.getloadavg()[0],
        "python": platform.python_version(), "libraries": {name: _version(name) for name in names},
    }  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # an extra
        return None


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, with commas")
    parser.add_argument("--rounds", type=int, default=5, help="that count, of every contender")
    parser.add_argument("--threads", type=int, default=1, help="per contender")
    parser.add_argument("--peerannot", help="a Python that has peerannot")
    parser.add_argument("--where", default="", help="conditions with this in their names alone; not for growth")
    parser.add_argument("--without", default="", help="contenders to leave out, with semicolons")
    parser.add_argument("--json", type=Path, default=Path("bench.json"))
    given = parser.parse_args()
    print(f"{'group':<10} {'condition':<34} {'contender':<22} {'wall ms':>10} {'CPU ms':>10} {'peak MB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        gpu, plotted = torch.cuda.is_available(), given.json.with_suffix(".svg")
        bench = Bench(given.rounds, given.threads, gpu, given.peerannot, Path(folder), plotted, [])
        bench.where, bench.without = given.where, given.without.split(";")
        for name in given.only.split(","):
            GROUPS[name](bench)
            document = {"machine": machine(given.threads), "rows": [asdict(row) for row in bench.rows]}
            given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
