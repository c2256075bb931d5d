"""Everything at once: a store with all kinds of faults, and kills at any moment; nothing wrong is published, or left.

Jobs are started until they are done; the whole bucket is looked at after each start. A minute of it takes

    MINUTES=1 STORM_SEED=7 python -m pytest -s -m slow tests/test_storm.py

and prints each job's starts, the faults by their kinds, and what is wrong, if anything.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import tarfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from crowdlayer.errors import CrowdlayerError
from crowdlayer.verify import verify
from tests.conftest import Finished, Store
from tests.forks import Forks
from tests.servers import (
    KINDS,
    Answer,
    Fault,
    Faults,
    Meddler,
    Request,
    Spoiler,
    is_listing,
    late,
    meddling,
    refused,
    unchanged,
)
from tests.test_catalogue import QUICK
from tests.test_faults import published
from tests.test_listings import listed_backwards, listed_twice

MINUTES = float(os.environ.get("MINUTES", "3"))
SEED = int(os.environ.get("STORM_SEED", "0"))
CALM_AFTER = 16
"""Starts of a job, after which the weather is fine: it must end now."""
SETTINGS = QUICK | {
    "N_EPOCHS": "6",
    "BATCH_SIZE": "6",
    "NUM_WORKERS": "1",
    "DATA_AUGMENTATION": "true",
    "GUARD": "false",
    "STORE_TIMEOUT": "3",
    "STORE_ATTEMPTS": "5",
}
ALLOWED = {0: "done", 74: "the store failed", 75: "interrupted", 77: "refused", -9: "killed"}
"""Exit codes; those of a job whose data and settings are right."""
KEPT = re.compile(
    r"results/crowdlayer\.json|results/crowdlayer/[^.].*|best_models/crowdlayer(\.pth|/.+)"
    r"|checkpoints/crowdlayer/(\d{8}\.json|[0-9a-f]{64}\.pt)|results/crowdlayer/\.probe"
)
"""What there may be of a run that is not done: a killed one may leave its probe, which the next start removes."""


@dataclass(frozen=True)
class Kind:
    """A kind of job."""

    name: str
    tasks: str = "data"
    settings: dict[str, str] = field(default_factory=dict)
    constants: dict[str, int] = field(default_factory=dict)


SMALL_PARTS = 5 * 2**20
"""Bytes; the smallest that S3 takes."""
JOBS = (
    Kind("folder"),
    Kind("folder, WORKDIR", settings={"WORKDIR": "{tmp}/work"}),
    Kind("tar", "packed/data.tar", {"WORKDIR": "{tmp}/work"}),
    Kind("zip, no checkpoints", "packed/data.zip", {"CHECKPOINT_EVERY": "0"}),
    Kind("folds", settings={"N_EPOCHS": "2", "FOLDS": "2", "WORKDIR": "{tmp}/work"}),
    Kind(
        "uploads in parts",
        settings={"MODEL": "mobilenet_v3_small", "N_EPOCHS": "3"},
        constants={"crowdlayer.storage.s3.PART": SMALL_PARTS, "crowdlayer.storage.etags.PART": SMALL_PARTS},
    ),
)

# --- faults ----------------------------------------------------------------------------------------------------------


def hung_up(answer: Answer) -> None:
    """It was done, and nobody says so."""
    raise ConnectionResetError


def somewhere_flipped(answer: Answer) -> None:
    """One bit of an object is another. That of a listing only TLS can notice."""
    if answer.body and not is_listing(answer):
        body, at = bytearray(answer.body), int.from_bytes(os.urandom(4), "big")
        body[at // 8 % len(body)] ^= 1 << at % 8
        answer.body = bytes(body)


def for_an_object(spoiler: Spoiler) -> Spoiler:
    """Listings are left alone."""
    return lambda answer: None if is_listing(answer) else spoiler(answer)


OFTEN = (
    *(kind for kind in KINDS if kind.name not in ("stalled", "flipped")),
    Fault("flipped", somewhere_flipped, only=("GET",)),
    Fault("no answer to a change although it was done", hung_up, only=("DELETE", "POST", "PUT")),
    Fault("stalled", late(5)),
    Fault("listed twice", listed_twice, only=("GET",)),
    Fault("listed backwards", listed_backwards, only=("GET",)),
)
"""What the job's own retries survive."""
GONE = Fault("listed and not there", for_an_object(refused(404, "NoSuchKey")), only=("GET",))
EXPIRED = Fault("credentials expired", refused(403, "ExpiredToken"), reaches_the_store=False)
SWAPPED = Fault("swapped after the listing", unchanged, only=("GET",))
AWAY = Fault("away", unchanged, hangs_up=True)
SELDOM = (GONE, EXPIRED, SWAPPED, AWAY)
"""What may cost a start."""


class Storm(Faults):
    """All of them: a share of the requests meets something frequent, a smaller one something seldom."""

    def __init__(self, store: Store, inputs: dict[str, bytes], seed: str, share: float, seldom: float) -> None:
        super().__init__(OFTEN, share)
        self.seed = seed  # type: ignore[assignment]
        self._store = store
        self._inputs = inputs
        self._swapped: set[str] = set()
        self._seldom = seldom
        self._back = 0.0

    def next(self, request: Request) -> Fault | None:
        if time.monotonic() < self._back:
            self.done[AWAY.name] += 1
            return AWAY
        often = super().next(request)
        draw = random.Random(f"{self.seed} seldom {request.method} {request.path} {time.monotonic_ns()}")
        fault = draw.choice(SELDOM) if draw.random() < self._seldom else None
        if fault is None or request.method not in fault.only:
            return often
        if fault is AWAY:
            self._back = time.monotonic() + draw.choice((3, 10, 30, 1000))
        if fault is SWAPPED:
            key = request.path.removeprefix(f"/{self._store.bucket}/")
            if key not in self._inputs:
                return often
            body = bytearray(self._inputs[key])
            body[len(body) // 2] ^= 1
            self._swapped.add(key)
            self._store.put(key, bytes(body))
        self.done[fault.name] += 1
        return fault

    def over(self) -> None:
        """What was swapped is swapped back; the store is there."""
        self._back = 0
        for key in self._swapped:
            self._store.put(key, self._inputs[key])
        self._swapped.clear()


# --- what must hold --------------------------------------------------------------------------------------------------


def lies(store: Store, inputs: dict[str, bytes], out: str, calm: dict[str, Any], *, done: bool) -> Iterator[str]:
    """What is wrong in the bucket: with the inputs, with what is published, with what is left."""
    keys = store.keys()
    yield from (
        f"{key} is changed or gone" for key, body in inputs.items() if key not in keys or store.get(key) != body
    )
    ours = {key.removeprefix(f"{out}/") for key in keys if key.startswith(f"{out}/")}
    yield from (f"litter: {key}" for key in keys if key not in inputs and not key.startswith((f"{out}/", "calm-")))
    yield from (f"litter: {name}" for name in sorted(ours) if not KEPT.fullmatch(name))
    yield from torn_checkpoints(store, out, ours)
    if "results/crowdlayer.json" in ours:
        try:
            verify(f"s3://{store.bucket}/{out}")
        except CrowdlayerError as error:
            yield f"results that are none: {error}"
        else:
            theirs = {
                name: what for name, what in published(store, f"{out}/").items()
                if not name.startswith("checkpoints/") and not name.endswith("/.probe")
            }  # fmt: skip
            different = sorted(n for n in theirs.keys() | calm.keys() if theirs.get(n) != calm.get(n))
            yield from (f"not what the run without faults has: {name}" for name in different)
    elif done:
        yield "done, and no results"
    if done:
        yield from (f"litter: {name}" for name in ours if name.startswith("checkpoints/") or name.endswith("/.probe"))


def torn_checkpoints(store: Store, out: str, ours: set[str]) -> Iterator[str]:
    """Parts that are not what they are called, and indexes without their parts: the index comes last and goes first."""
    for name in sorted(ours):
        if name.endswith(".pt") and hashlib.sha256(store.get(f"{out}/{name}")).hexdigest() != Path(name).stem:
            yield f"torn: {name}"
        if re.fullmatch(r"checkpoints/.*\.json", name):
            index = json.loads(store.get(f"{out}/{name}"))
            for part, _ in index["parts"].values():
                if f"checkpoints/crowdlayer/{part}" not in ours:
                    yield f"{name} names {part}, which is not there"


def wrong_end(done: Finished, left: set[str]) -> Iterator[str]:
    """What is wrong with the end of a job, and with what it left in TMPDIR."""
    if done.code not in ALLOWED:
        yield f"ended with {done.code}: {done.last_line}"
    if "Traceback" in done.stderr:
        yield "a traceback"
    if done.code in (74, 75, 77) and not re.match(r"crowdlayer: \S.*", done.last_line):
        yield f"ended with {done.code} and a last line {done.last_line!r}"
    if bool(done.stdout) != (done.code == 0) and done.code != -9:
        yield f"ended with {done.code} and said {done.stdout!r}"
    kept = {name for name in left if name.startswith("crowdlayer-kept-")}
    if kept and (done.code not in (74, 77) or any(name not in done.stderr for name in kept)):
        yield f"ended with {done.code} and kept {sorted(kept)}"
    if done.code != -9 and left - kept:
        yield f"ended with {done.code} and left {sorted(left - kept)} in TMPDIR"


# --- jobs ------------------------------------------------------------------------------------------------------------


@dataclass
class Sea:
    """A store with the data, a proxy before it, and what was seen so far."""

    store: Store
    meddler: Meddler
    forks: Forks
    inputs: dict[str, bytes]
    folder: Path
    calm: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest_signal: float = 0
    """Seconds from a SIGTERM to the end."""

    def start(
        self, kind: Kind, out: str, folder: Path, url: str, signals: list[tuple[float, int]], missing: list[str]
    ) -> Finished:
        bucket = f"s3://{self.store.bucket}"
        settings = SETTINGS | {"TASKS": f"{bucket}/{kind.tasks}", "OUTPUT": f"{bucket}/{out}"} | kind.settings
        named = {f"CROWDLAYER_{name}": value.replace("{tmp}", str(folder)) for name, value in settings.items()}
        environment = dict(os.environ) | named | {"AWS_ENDPOINT_URL": url, "TMPDIR": str(folder / "TMPDIR")}
        return Finished(*self.forks.run([], environment, 500, signals, kind.constants, missing))

    def expected(self, kind: Kind) -> dict[str, Any]:
        """What a run without faults publishes."""
        if kind.name not in self.calm:
            folder, out = self.folder / "job", f"calm-{len(self.calm)}"
            (folder / "TMPDIR").mkdir(parents=True)
            done = self.start(kind, out, folder, f"http://{self.meddler.upstream}", [], [])
            assert done.code == 0, done.stderr
            self.calm[kind.name] = published(self.store, f"{out}/")
            shutil.rmtree(folder)
        return self.calm[kind.name]

    def job(self, number: int, kind: Kind) -> None:
        """One job until it is done."""
        calm, out, folder = self.expected(kind), f"out-{number}", self.folder / "job"
        rng = random.Random(f"{SEED} {number}")
        missing = rng.choice(([], ["obstore", "obstore.store"]))
        share, seldom = rng.choice((0.03, 0.1, 0.2)), rng.choice((0, 0.002, 0.006))
        storm = Storm(self.store, self.inputs, f"{SEED} {number}", share, seldom)
        (folder / "TMPDIR").mkdir(parents=True)
        codes: list[int] = []
        while not codes or codes[-1] != 0:
            fine = len(codes) >= CALM_AFTER
            self.meddler.faults = None if fine else storm
            signals = [] if fine else planned(rng)
            before, started = names(folder / "TMPDIR"), time.monotonic()
            done = self.start(kind, out, folder, self.meddler.url, signals, missing)
            spent = time.monotonic() - started
            storm.over()
            self.meddler.requests.clear()
            codes.append(done.code)
            sent = "nothing sent" if not signals or spent < signals[0][0] else "+".join(
                signal.Signals(number).name for _, number in signals)  # fmt: skip
            self.ends[f"{sent}: {done.code}"] += 1
            if sent == "SIGTERM":
                self.slowest_signal = max(self.slowest_signal, spent - signals[0][0])
            found = [*wrong_end(done, names(folder / "TMPDIR") - before), *self.look(out, calm, done=done.code == 0)]
            if fine and done.code != 0:
                found.append("does not end in fine weather")
            for finding in found:
                line = f"FINDING, seed {SEED}, job {number} ({kind.name}), start {len(codes)}, {sent}: {finding}"
                self.findings.append(line)
                print(f"{line}\n{done.stderr}", flush=True)
            if fine:
                break
        self.faults += storm.done
        how = "botocore" if missing else "obstore"
        print(f"{time.strftime('%T')} job {number} ({kind.name}, {how}): {codes}, {storm.done.total()} faults",
              flush=True)  # fmt: skip
        self.meddler.faults = None
        for key in self.store.keys():
            if key.startswith(f"{out}/"):
                self.store.client.delete_object(Bucket=self.store.bucket, Key=key)
        shutil.rmtree(folder)

    def look(self, out: str, calm: dict[str, Any], *, done: bool) -> list[str]:
        """All that is wrong in the bucket; once more where a request of a killed job has just now come to its end."""
        try:
            return list(lies(self.store, self.inputs, out, calm, done=done))
        except ClientError:
            time.sleep(2)
            return list(lies(self.store, self.inputs, out, calm, done=done))

    def unended(self) -> list[Any]:
        """What a killed job leaves, or an upload whose beginning nobody was told of: a bucket's lifecycle ends them."""
        return list(self.store.client.list_multipart_uploads(Bucket=self.store.bucket).get("Uploads", []))

    def summary(self) -> str:
        return "\n".join([
            f"starts, by signal and exit code: {dict(sorted(self.ends.items()))}",
            f"slowest end after SIGTERM: {self.slowest_signal:.1f} s",
            f"uploads in parts that nobody ended: {len(self.unended())}",
            f"faults: {dict(self.faults.most_common())}",
            *(self.findings or ["nothing wrong was found"]),
        ])  # fmt: skip


def names(folder: Path) -> set[str]:
    """What is in a folder, but for torch's cache."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")}


def planned(rng: random.Random) -> list[tuple[float, int]]:
    """The signals of one start: most are killed, or told to end, soon or late."""
    moment = rng.choice((rng.uniform(0, 3), rng.uniform(0, 15), rng.expovariate(1 / 20)))
    match rng.randrange(6):
        case 0 | 1:
            return []
        case 2 | 3:
            return [(moment, signal.SIGKILL)]
        case 4:
            return [(moment, signal.SIGTERM)]
        case _:
            return [(moment, signal.SIGTERM), (rng.uniform(0, 2), signal.SIGKILL)]


@pytest.fixture
def sea(store: Store, endpoint: str, forks: Forks, shapes: Path, tmp_path: Path) -> Iterator[Sea]:
    files = {str(path.relative_to(shapes)): path.read_bytes() for path in sorted(shapes.rglob("*")) if path.is_file()}
    tar, packed = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive, zipfile.ZipFile(packed, "w") as zipped:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
            zipped.writestr(name, body)
    inputs = {f"data/{name}": body for name, body in files.items()}
    inputs |= {"packed/data.tar": tar.getvalue(), "packed/data.zip": packed.getvalue()}
    for key, body in inputs.items():
        store.put(key, body)
    with meddling(endpoint) as meddler:
        yield Sea(store, meddler, forks, inputs, tmp_path)


@pytest.mark.slow
def test_all_faults_and_kills_at_once_cost_starts_and_nothing_else(sea: Sea) -> None:
    until, number = time.monotonic() + 60 * MINUTES, 0
    while time.monotonic() < until:
        sea.job(number, JOBS[number % len(JOBS)])
        number += 1
    print(f"{number} jobs in {MINUTES:g} minutes, seed {SEED}\n{sea.summary()}", flush=True)
    assert not sea.findings
