"""A store that fails now and then costs time, and nothing else; one that fails for good is said to."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from crowdlayer.errors import StoreError
from crowdlayer.storage import s3
from crowdlayer.storage.files import Stored
from crowdlayer.storage.s3 import Bucket
from crowdlayer.verify import verify
from tests.conftest import ROOT, Finished, Store
from tests.forks import Forks
from tests.servers import KINDS, Fault, Faults, Meddler, Request, is_listing, late, one_byte_flipped
from tests.test_catalogue import QUICK

RESET = next(kind for kind in KINDS if kind.name == "reset")
PATIENT = {"STORE_TIMEOUT": "8", "STORE_ATTEMPTS": "12"}
OF_A_JOB = [
    *(kind for kind in KINDS if kind.name not in ("stalled", "flipped")),
    Fault("stalled", late(10)),
    Fault("flipped", lambda answer: None if is_listing(answer) else one_byte_flipped(answer), only=("GET",)),
]
"""A busy machine's store may be slower than the matrix's time-out; a bit of a listing is TLS's to notice."""


def job(forks: Forks, **settings: str) -> Finished:
    named = {f"CROWDLAYER_{name}": value for name, value in (QUICK | PATIENT | settings).items()}
    return Finished(*forks.run([], dict(os.environ) | named, timeout=300))


def published(store: Store, prefix: str) -> dict[str, Any]:
    """Everything below the prefix; of the results what two runs of the same must share."""
    bodies = {key.removeprefix(prefix): store.get(key) for key in store.keys() if key.startswith(prefix)}
    results = json.loads(bodies.pop("results/crowdlayer.json"))
    del results["job"]["seconds"], results["job"]["settings"]["output"]
    results["job"]["files"] = lasting(results["job"]["files"])
    return {"results": results, **lasting(bodies)}


def lasting(files: dict[str, Any]) -> dict[str, Any]:
    """Those without times and places in them."""
    times = ("report.json", "report.html", "README.md", "results.csv", "args.yaml", "manifest.sha256")
    return {name: what for name, what in files.items() if not name.endswith(times)}


# --- now and then ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 31))])
def test_a_job_among_faults_has_the_results_of_one_without(
    seed: int, shapes: Path, store: Store, meddler: Meddler, forks: Forks
) -> None:
    tasks = store.put_tree(shapes)
    out = f"s3://{store.bucket}"
    assert job(forks, TASKS=tasks, OUTPUT=f"{out}/calm").code == 0

    meddler.faults = Faults(OF_A_JOB, share=0.1, seed=seed)
    done = job(forks, TASKS=tasks, OUTPUT=f"{out}/stormy")
    faults, meddler.faults = meddler.faults, None

    assert done.code == 0, done.stderr
    assert sum(faults.done.values()) >= 1
    assert published(store, "stormy/") == published(store, "calm/")
    assert verify(f"{out}/stormy") == verify(f"{out}/calm")
    others = [key for key in store.keys() if not key.startswith(("calm/", "stormy/", "data/"))]
    assert others == []
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=store.bucket)


# --- for good --------------------------------------------------------------------------------------------------------

BOUND = 60
"""Seconds, on a machine with other things to do, in which an operation gives up: two attempts of two seconds each."""


class Once(Faults):
    """The first request that it may concern goes wrong, and no other."""

    def __init__(self, fault: Fault) -> None:
        super().__init__([fault], share=1)

    def next(self, request: Request) -> Fault | None:
        return None if self.done else super().next(request)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3.patience, "timeout", 1)
    monkeypatch.setattr(s3.patience, "attempts", 3)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("often", ["once", pytest.param("always", marks=pytest.mark.slow)])
@pytest.mark.parametrize("operation", ["list", "find", "read", "download", "upload", "delete"])
@pytest.mark.parametrize("fault", KINDS, ids=lambda fault: fault.name)
def test_a_fault_is_survived_once_and_told_when_it_stays(
    fault: Fault, operation: str, often: str, store: Store, meddler: Meddler, tmp_path: Path
) -> None:
    """The matrix: kinds of faults × operations × once or always. What is done is done whole, or the error is 74's."""
    body = os.urandom(100_000)
    store.put("data/x", body)
    (tmp_path / "x").write_bytes(body)
    bucket = Bucket(store.bucket, "data")
    etag = store.client.head_object(Bucket=store.bucket, Key="data/x")["ETag"]

    def act() -> Any:
        match operation:
            case "list":
                return [stored.name for stored in bucket.listing()]
            case "find":
                return bucket.find("x")
            case "read":
                return bucket.read("x")
            case "download":
                with (tmp_path / "down").open("w+b") as file:
                    return bucket.download(Stored("x", len(body), etag), file)
            case "upload":
                return bucket.upload(tmp_path / "x", "y")
            case _:
                return bucket.delete("x")

    expected = act()
    if operation == "delete":
        store.put("data/x", body)
    meddler.faults = Once(fault) if often == "once" else Faults([fault], share=1)
    started = time.monotonic()
    told = ""
    try:
        assert act() == expected
    except StoreError as error:
        told = str(error)
    assert time.monotonic() - started < BOUND
    if told:
        assert often == "always"
        assert meddler.faults.done[fault.name] > 0
        assert told.startswith(f"s3://{store.bucket}/data")
    keys = store.keys()
    assert all(store.get(key) == body for key in keys)
    assert keys in (["data/x"], ["data/x", "data/y"], ["data/y"], [])


class Gone(Faults):
    """From the first put to `path` on, or the first of another method, the store is away: for good or some seconds."""

    def __init__(self, path: str, seconds: float = math.inf, methods: tuple[str, ...] = ("PUT", "POST")) -> None:
        super().__init__([RESET], share=1)
        self._path = path
        self._methods = methods
        self._seconds = seconds
        self._since: float | None = None

    def next(self, request: Request) -> Fault | None:
        if self._since is None and request.method in self._methods and self._path in request.path:
            self._since = time.monotonic()
        if self._since is None or time.monotonic() > self._since + self._seconds:
            return None
        return super().next(request)


@pytest.mark.parametrize(
    ("path", "method", "seconds"),
    [
        ("best_models/", "PUT", 5),
        pytest.param("train/", "GET", 15, marks=pytest.mark.slow),
        pytest.param("train/", "GET", 60, marks=pytest.mark.slow),
    ],
)
def test_a_store_that_is_away_for_a_while_costs_a_while(
    path: str, method: str, seconds: float, shapes: Path, store: Store, meddler: Meddler, forks: Forks
) -> None:
    meddler.faults = Gone(path, seconds, (method,))
    done = job(forks, TASKS=store.put_tree(shapes), OUTPUT=f"s3://{store.bucket}/out")
    assert done.code == 0, done.stderr
    assert meddler.faults.done["reset"] > 2
    meddler.faults = None
    assert verify(f"s3://{store.bucket}/out") > 2


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/checkpoints/", False),
        ("/best_models/", True),
        ("/results/crowdlayer.json", False),
        pytest.param("/checkpoints/", True, marks=pytest.mark.slow),
        pytest.param("/best_models/", False, marks=pytest.mark.slow),
        pytest.param("/results/crowdlayer.json", True, marks=pytest.mark.slow),
    ],
)
def test_a_store_that_stays_away_ends_the_job_with_74_and_all_is_kept_here(
    path: str, named: bool, shapes: Path, store: Store, meddler: Meddler, forks: Forks, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    temporary = tmp_path / "TMPDIR"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    work = {"WORKDIR": str(tmp_path / "work")} if named else {}
    before = store.put_tree(shapes)
    meddler.faults = Gone(path)
    out = f"s3://{store.bucket}/out"
    done = job(forks, TASKS=before, OUTPUT=out, STORE_TIMEOUT="1", STORE_ATTEMPTS="2", **work)
    meddler.faults = None

    assert done.code == 74, done.stderr
    assert done.last_line.startswith(f"crowdlayer: {out}/")
    kept = Path(re.search(r"is kept in (\S+): ", done.stderr)[1])  # type: ignore[index]
    assert kept.parent == (tmp_path / "work" if named else temporary)
    assert verify(str(kept / "results")) > 2
    assert "out/results/crowdlayer.json" not in store.keys()
    assert not [key for key in store.keys() if not key.startswith(("data/", "out/"))]
    theirs = json.loads((kept / "results/results/crowdlayer.json").read_text())

    again = job(forks, TASKS=before, OUTPUT=out, **work)
    assert again.code == 0, again.stderr
    assert kept.exists() is not named
    del (ours := published(store, "out/"))["results"]["job"]["settings"]
    assert {name: theirs[name] for name in ("train_loss", "val_loss", "best_epoch")}.items() <= ours["results"].items()
    assert lasting(theirs["job"]["files"]) == ours["results"]["job"]["files"]


# --- many at once ----------------------------------------------------------------------------------------------------

FLEET = 64
OF_THE_FLEET = """
import os, sys
from pathlib import Path
from crowdlayer.data.layout import belongs
from crowdlayer.storage.sync import sync

def one(number):
    try:
        assert len(sync(sys.argv[1], Path(sys.argv[2], str(number)), belongs).digests) == int(sys.argv[3])
    except BaseException as error:
        print(number, error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

children = [os.fork() or one(number) for number in range(int(sys.argv[4]))]
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""
BUSY = 8
"""Seconds."""


class Busy(Faults):
    """The store has too much to do for a while, from the first request on, and says so to everybody."""

    def __init__(self) -> None:
        super().__init__([next(kind for kind in KINDS if kind.name == "503")], share=1)
        self.asked: list[float] = []

    def next(self, request: Request) -> Fault | None:
        self.asked.append(time.monotonic())
        return super().next(request) if self.asked[-1] < self.asked[0] + BUSY else None


@pytest.mark.slow
def test_jobs_that_start_together_do_not_hammer_a_store_that_is_busy(
    shapes: Path, store: Store, meddler: Meddler, tmp_path: Path
) -> None:
    """They wait longer each time, and each for itself."""
    tasks, n_files = store.put_tree(shapes), sum(path.is_file() for path in shapes.rglob("*"))
    meddler.faults = busy = Busy()
    done = subprocess.run(
        [sys.executable, "-c", OF_THE_FLEET, tasks, str(tmp_path), str(n_files), str(FLEET)],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    refused = [moment - busy.asked[0] for moment in busy.asked if moment < busy.asked[0] + BUSY]
    print(f"{len(refused)} requests of {FLEET} jobs in {BUSY} s of 503, {len(busy.asked)} in all")
    assert len(refused) / FLEET < 8
    last = [sum(BUSY - n - 1 <= moment < BUSY - n for moment in refused) for n in range(4)]
    assert max(last) < FLEET
