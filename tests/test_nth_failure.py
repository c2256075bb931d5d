"""Whatever write, flush, rename or request fails, or is a job's last: nothing that it leaves is a lie, and it goes on.

A sample of the points in every run of the tests; all of them, and two hundred kills, with `make slow`, where `STRIDE`,
`EPOCHS`, `KILLS` and `KILL_SEED` say how many and which.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from crowdlayer.errors import SettingsError
from crowdlayer.verify import verify
from tests.conftest import QUICK, Finished, Store
from tests.crowds import write_shapes
from tests.failing import POINTS
from tests.forks import Forks
from tests.servers import KINDS, Fault, Faults, Request, meddling
from tests.test_faults import published

SEED = int(os.environ.get("KILL_SEED", "0"))
STRIDE = int(os.environ.get("STRIDE", "1"))
"""Of the points to fail at: 10 for every tenth."""
KILLS = int(os.environ.get("KILLS", "100"))
EPOCHS, STEPS = int(os.environ.get("EPOCHS", "25")), 4
"""Of the run that is killed at each of its steps; steps per epoch."""
SMALL = {"MODEL": "squeezenet1_1", "IMG_SIZE": "32", "BATCH_SIZE": "6"}
"""A job of a second of CPU: three megabytes of weights."""
NORMED = {"MODEL": "shufflenet_v2_x0_5", "IMG_SIZE": "16"}
"""One whose statistics of batches must come back too."""
IN_NO_TWO_RUNS_THE_SAME = ("report.json", "report.html", "README.md", "manifest.sha256")
"""They tell of seconds."""
TIMES = ("time", "seconds")
"""Columns of results.csv."""


@dataclass
class Runs:
    """A job that is started again and again, in one OUTPUT and one WORKDIR."""

    forks: Forks
    folder: Path
    settings: dict[str, str]

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def log(self) -> Path:
        return self.folder / "failing"

    def start(self, order: str = "none 1 EIO") -> Finished:
        """With what `tests.failing` shall do to it."""
        places = {"OUTPUT": str(self.out), "WORKDIR": str(self.work)} | self.settings
        named = {f"CROWDLAYER_{name}": value for name, value in (QUICK | places).items()}
        self.log.unlink(missing_ok=True)
        environment = dict(os.environ) | named | {"FAILING": f"{order} {self.log}"}
        return Finished(*self.forks.run([], environment, timeout=300))

    def noted(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def clear(self) -> None:
        for folder in (self.out, self.work):
            shutil.rmtree(folder, ignore_errors=True)

    def outcome(self) -> dict[str, Any]:
        """All that is published, by SHA-256, but for the times in it."""
        found: dict[str, Any] = {
            str(path.relative_to(self.out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.out.rglob("*"))
            if path.is_file() and path.name not in IN_NO_TWO_RUNS_THE_SAME
        }
        del found["results/crowdlayer/results.csv"]
        with (self.out / "results/crowdlayer/results.csv").open(newline="") as file:
            found["epochs"] = [{k: v for k, v in row.items() if k.strip() not in TIMES} for row in csv.DictReader(file)]
        found["results/crowdlayer.json"] = results = json.loads((self.out / "results/crowdlayer.json").read_bytes())
        del results["job"]["seconds"]
        for name in list(results["job"]["files"]):
            if name.endswith((*IN_NO_TWO_RUNS_THE_SAME, "results.csv")):
                del results["job"]["files"][name]
        return found


def assert_no_lie(location: str) -> bool:
    """Results that are there name what is there; returns whether there are some."""
    try:
        return verify(location) > 2
    except SettingsError:
        return False


def whole_names(out: Path) -> bool:
    """No file but those that a run publishes, and its checkpoints, and no empty folder: nothing half-written."""
    kept = re.compile(r"(results|best_models)/crowdlayer[./].+|checkpoints/crowdlayer/(\d{8}\.json|[0-9a-f]{64}\.pt)")
    paths = [path for path in out.rglob("*") if path.is_file() or not any(path.iterdir())]
    names = [str(path.relative_to(out)) for path in paths]
    return all(kept.fullmatch(name) and not Path(name).name.startswith(".") for name in names)


def kept_are_whole(workdir: Path) -> bool:
    """Results that could not be put to the output, and say so, are read by other programs."""
    return all(json.loads(path.read_bytes()) for path in workdir.glob("crowdlayer-kept-*/results/results/*.json"))


def fail(runs: Runs, order: str, clean: dict[str, Any]) -> int | None:
    """Let the job fail so, look at what it leaves, and let it go on; its exit code, None where nothing was to fail."""
    runs.clear()
    done = runs.start(order)
    noted = runs.noted()
    assert "not flushed" not in noted, noted
    if not noted:
        assert done.code == 0, done.stderr
        return None
    assert done.code in (0, 74, 77), f"{order}: {done.stderr}"
    assert "Traceback" not in done.stderr
    if done.code:
        assert re.match(r"crowdlayer: \S.*: ", done.last_line), f"{order}: {done.stderr}"
    if runs.out.exists():
        assert whole_names(runs.out), order
        assert assert_no_lie(str(runs.out)) or done.code != 0, f"{order}: {done.stderr}"
    assert kept_are_whole(runs.work), order
    again = runs.start()
    assert again.code == 0, f"{order}: {again.stderr}"
    assert runs.outcome() == clean, order
    return done.code


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    return write_shapes(tmp_path_factory.mktemp("few"), n_train=12, n_val=3, n_test=3)


@pytest.fixture
def runs(forks: Forks, few: Path, tmp_path: Path) -> Runs:
    return Runs(forks, tmp_path, SMALL | {"TASKS": str(few)})


def test_a_disk_that_fails_once_costs_a_start(runs: Runs) -> None:
    """Two points of hundreds."""
    assert runs.start().code == 0
    clean = runs.outcome()
    rng = random.Random(SEED)
    assert fail(runs, f"write {rng.randrange(1, 40)} ENOSPC", clean) in (0, 74)
    assert fail(runs, f"rename {rng.randrange(1, 12)} EIO", clean) in (0, 74)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["folder", "bucket"])
@pytest.mark.parametrize("what", POINTS)
def test_a_disk_that_fails_at_any_moment_costs_a_start(what: str, source: str, runs: Runs, store: Store) -> None:
    """The first fails, the second, … until a run passes untouched."""
    if source == "bucket":
        runs.settings["TASKS"] = store.put_tree(Path(runs.settings["TASKS"]))
    assert runs.start().code == 0
    clean = runs.outcome()
    codes: Counter[int] = Counter()
    number = 1
    while (code := fail(runs, f"{what} {number} {'ENOSPC' if what == 'write' else 'EIO'}", clean)) is not None:
        codes[code] += 1
        number += STRIDE
    print(f"{what}, data in a {source}: {codes.total()} points of {number - 1}, by exit code {dict(codes)}")
    assert number > 1
    assert codes[74] > 0 or what == "link"  # a file that cannot get a second name is copied


class Nth(Faults):
    """The n-th request fails, and as often as it is tried again; or once alone."""

    def __init__(self, number: int, fault: Fault, *, once: bool) -> None:
        super().__init__([fault], share=1)
        self._left = number
        self._once = once
        self._hit: tuple[str, str] | None = None

    def next(self, request: Request) -> Fault | None:
        this = (request.method, request.path)
        self._left -= 1
        if self._left == 0:
            self._hit = this
        elif self._hit != this or self._once:
            return None
        return super().next(request) if self._left <= 0 else None


def request_fails(number: int, once: bool, forks: Forks, data: str, store: Store, endpoint: str) -> int | None:
    """The exit code of the job whose n-th request fails; None where it has fewer."""
    out = f"s3://{store.bucket}/out"
    fault = KINDS[number % 2 * 4]  # 500, or a reset
    patience = {"STORE_TIMEOUT": "20", "STORE_ATTEMPTS": "3" if once else "1"}
    settings = QUICK | SMALL | {"TASKS": data, "OUTPUT": out} | patience

    def start(url: str) -> Finished:
        named = {f"CROWDLAYER_{name}": value for name, value in settings.items()} | {"AWS_ENDPOINT_URL": url}
        with tempfile.TemporaryDirectory() as kept:  # a job whose last requests fail keeps its results there
            return Finished(*forks.run([], dict(os.environ) | named | {"TMPDIR": kept}, timeout=300))

    for key in store.keys():
        if key.startswith(("out/", "clean/")):
            store.client.delete_object(Bucket=store.bucket, Key=key)
    with meddling(endpoint) as proxy:
        proxy.faults = Nth(number, fault, once=once)
        done = start(proxy.url)
        hit = proxy.faults.done.total()
    if not hit:
        assert done.code == 0, done.stderr
        return None
    assert done.code in ((0,) if once else (0, 74)), f"request {number}: {done.stderr}"
    assert "Traceback" not in done.stderr
    if done.code:
        assert re.match(r"crowdlayer: \S.*: ", done.last_line), done.stderr
    assert assert_no_lie(out) or done.code == 74, f"request {number}: {done.stderr}"
    again = start(endpoint)
    assert again.code == 0, f"request {number}: {again.stderr}"
    assert verify(out) > 2
    assert not [key for key in store.keys() if key.startswith("out/checkpoints")]
    return done.code


def figures(store: Store) -> dict[str, Any]:
    return published(store, "out/")


@pytest.mark.slow
@pytest.mark.parametrize("once", [True, False])
def test_a_request_that_fails_at_any_moment_costs_nothing_or_a_start(
    once: bool, forks: Forks, few: Path, store: Store, endpoint: str
) -> None:
    """The first request fails, the second, … until a run passes untouched."""
    data = store.put_tree(few)
    codes: Counter[int] = Counter()
    assert request_fails(10**6, once, forks, data, store, endpoint) is None
    clean = figures(store)
    number = 1
    while (code := request_fails(number, once, forks, data, store, endpoint)) is not None:
        assert figures(store) == clean, number
        codes[code] += 1
        number += STRIDE
    often = "once" if once else "for good"
    print(f"requests, {often}: {codes.total()} points of {number - 1}, by exit code {dict(codes)}")
    assert number > 40


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def long(runs: Runs) -> tuple[Runs, dict[str, Any]]:
    """A run of a hundred steps, and what it comes to when nobody kills it."""
    augmented = {"DATA_AUGMENTATION": "true", "OPTIMIZER": "adam", "SCHEDULER": "cosine", "GUARD": "false"}
    runs.settings |= NORMED | {"BATCH_SIZE": "3", "N_EPOCHS": str(EPOCHS)} | augmented
    assert runs.start().code == 0
    clean = runs.outcome()
    runs.clear()
    return runs, clean


def steps_done(runs: Runs) -> int:
    """Of the newest checkpoint: put to the output, or left by a killed start, whose successor puts it."""
    folders = (runs.out / "checkpoints/crowdlayer", runs.work / "run/checkpoints")
    indexes = sorted((path for folder in folders for path in folder.glob("*.json")), key=lambda path: path.name)
    if not indexes:
        return 0
    index = json.loads(indexes[-1].read_bytes())
    return int(index["epoch"]) * STEPS + int(index["step"])


@pytest.mark.slow
def test_a_kill_at_every_step_changes_nothing(long: tuple[Runs, dict[str, Any]]) -> None:
    runs, clean = long
    starts = 0
    for step in range(1, EPOCHS * STEPS + 1):
        done = runs.start(f"step {step - steps_done(runs)} SIGKILL")
        assert done.code == -9, f"step {step}: {done.stderr}"
        assert not assert_no_lie(str(runs.out)) if runs.out.exists() else True
        starts += 1
    assert runs.start().code == 0
    assert runs.outcome() == clean
    print(f"{starts} kills, one at each step")


@pytest.mark.slow
def test_kills_inside_writes_change_nothing(long: tuple[Runs, dict[str, Any]]) -> None:
    """Seeded ones, of the next writes, flushes and renames of whatever start it is."""
    runs, clean = long
    rng = random.Random(SEED)
    kills, ends = 0, 0
    while kills < KILLS:
        what = rng.choice(POINTS[:3])
        done = runs.start(f"{what} {rng.randrange(1, {'write': 400, 'fsync': 60, 'rename': 60}[what])} SIGKILL")
        assert "not flushed" not in runs.noted()
        assert done.code in (0, -9), done.stderr
        kills += done.code == -9
        if runs.out.exists():
            assert_no_lie(str(runs.out))
        if done.code == 0:
            assert runs.outcome() == clean
            ends += 1
            runs.clear()
    assert runs.start().code == 0
    assert runs.outcome() == clean
    print(f"{kills} kills inside writes, {ends + 1} runs ended")


@pytest.mark.slow
def test_kills_inside_uploads_change_nothing(long: tuple[Runs, dict[str, Any]], store: Store) -> None:
    """Seeded ones, between two pieces that go to a bucket: of checkpoints, results and what is asked meanwhile."""
    runs, _ = long
    out = f"s3://{store.bucket}/out"
    runs.settings |= {"OUTPUT": out, "N_EPOCHS": "5"}
    assert runs.start().code == 0
    clean = figures(store)
    rng = random.Random(SEED)
    kills, ends = 0, 0
    while kills < KILLS:
        done = runs.start(f"send {rng.randrange(1, 150)} SIGKILL")
        assert done.code in (0, -9), done.stderr
        kills += done.code == -9
        assert_no_lie(out)
        if done.code == 0:
            assert figures(store) == clean
            assert not [key for key in store.keys() if key.startswith("out/checkpoints")]
            ends += 1
            runs.clear()
            for key in [key for key in store.keys() if key.startswith("out/")]:
                store.client.delete_object(Bucket=store.bucket, Key=key)
    assert runs.start().code == 0
    assert figures(store) == clean
    print(f"{kills} kills inside uploads, {ends + 1} runs ended")


@pytest.mark.slow
def test_twenty_signals_change_nothing(long: tuple[Runs, dict[str, Any]]) -> None:
    runs, clean = long
    rng = random.Random(SEED)
    for _ in range(20):
        done = runs.start(f"step {rng.randrange(1, STEPS + 1)} SIGTERM")
        assert done.code == 75, done.stderr
    assert runs.start().code == 0
    assert runs.outcome() == clean


@pytest.mark.parametrize("order", [pytest.param("step 3 SIGKILL", marks=pytest.mark.slow), "step 5 SIGTERM"])
def test_folds_go_on_where_they_were(runs: Runs, order: str) -> None:
    """A run of eight steps: two epochs of two, and of one for each fold."""
    runs.settings |= {"N_EPOCHS": "2", "FOLDS": "2"}
    assert runs.start().code == 0
    clean = runs.outcome()
    runs.clear()
    ends = [runs.start(order)]
    while ends[-1].code != 0 and len(ends) < 8:
        ends.append(runs.start(order))
    assert runs.outcome() == clean
    if order == "step 5 SIGTERM":
        assert [done.code for done in ends] == [75, 0]
        assert ends[0].last_line.startswith("crowdlayer: SIGTERM: fold 1 of 2 was interrupted in epoch 1 of 2, after")
    else:
        assert [done.code for done in ends] == [-9, -9, -9, 0]


@pytest.fixture
def compared(runs: Runs) -> tuple[Runs, dict[str, Any]]:
    """A run of twelve steps: two epochs of two, and as many of each baseline."""
    runs.settings |= {"N_EPOCHS": "2", "BASELINES": "majority,dawid-skene"}
    assert runs.start().code == 0
    clean = runs.outcome()
    runs.clear()
    return runs, clean


@pytest.mark.parametrize(
    ("order", "code", "starts"),
    [
        ("step 3 SIGKILL", -9, 6),
        ("step 3 SIGTERM", 75, 5),
        pytest.param("step 1 SIGTERM", 75, 13, marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_starts_live_for_a_few_steps_comes_to_its_end(
    order: str, code: int, starts: int, compared: tuple[Runs, dict[str, Any]]
) -> None:
    """A kill costs the step since the last epoch, a signal none."""
    runs, clean = compared
    ends = [runs.start(order) for _ in range(starts)]
    assert [done.code for done in ends] == [code] * (starts - 1) + [0], ends[-1].stderr
    assert runs.outcome() == clean
    where = [done.last_line.partition("; ")[0] for done in ends[:3]]
    if order == "step 3 SIGTERM":
        assert where == [
            "crowdlayer: SIGTERM: the run was interrupted in epoch 2 of 2, after 1 of 2 steps",
            "crowdlayer: SIGTERM: baseline majority was interrupted in epoch 1 of 2, after 2 of 2 steps",
            "crowdlayer: SIGTERM: baseline dawid-skene was interrupted in epoch 1 of 2, after 1 of 2 steps",
        ]


def test_what_was_done_of_a_baseline_outlives_a_start_that_does_not_come_to_it(
    compared: tuple[Runs, dict[str, Any]],
) -> None:
    """Which evaluates the run again before it goes on with the baseline, and is stopped in there."""
    runs, clean = compared
    assert runs.start("step 7 SIGTERM").code == 75
    stopped = runs.start("evaluation 1 SIGTERM")
    assert stopped.code == 75
    assert stopped.last_line.startswith("crowdlayer: SIGTERM: the run was interrupted after its last epoch; the check")
    done = runs.start("step 6 SIGKILL")
    assert done.code == 0, done.stderr  # five are left
    assert runs.outcome() == clean
