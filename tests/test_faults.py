"""A store that fails now and then costs time, and nothing else; one that fails for good is said to."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crowdlayer import s3
from crowdlayer.errors import StoreError
from crowdlayer.files import Stored
from crowdlayer.s3 import Bucket
from crowdlayer.verify import verify
from tests.conftest import Finished, Store
from tests.forks import Forks, forking
from tests.servers import KINDS, Fault, Faults, Meddler, Request, meddling
from tests.test_catalogue import QUICK

PATIENT = {"STORE_TIMEOUT": "2", "STORE_ATTEMPTS": "12"}


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with forking() as server:
        yield server


@pytest.fixture
def meddler(store: Store, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Meddler]:
    """A proxy between the job and `store`."""
    with meddling(endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def job(forks: Forks, **settings: str) -> Finished:
    named = {f"CROWDLAYER_{name}": value for name, value in (QUICK | PATIENT | settings).items()}
    return Finished(*forks.run([], dict(os.environ) | named, timeout=300))


def published(store: Store, prefix: str) -> dict[str, Any]:
    """Everything below the prefix; of the results what two runs of the same must share."""
    bodies = {key.removeprefix(prefix): store.get(key) for key in store.keys() if key.startswith(prefix)}
    results = json.loads(bodies.pop("results/crowdlayer.json"))
    del results["job"]["seconds"], results["job"]["settings"]["output"]
    return {"results": results, **bodies}


# --- now and then ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 31))])
def test_a_job_among_faults_has_the_results_of_one_without(
    seed: int, shapes: Path, store: Store, meddler: Meddler, forks: Forks
) -> None:
    tasks = store.put_tree(shapes)
    out = f"s3://{store.bucket}"
    assert job(forks, TASKS=tasks, OUTPUT=f"{out}/calm").code == 0

    meddler.faults = Faults(KINDS, share=0.1, seed=seed)
    done = job(forks, TASKS=tasks, OUTPUT=f"{out}/stormy")
    faults, meddler.faults = meddler.faults, None

    assert done.code == 0, done.stderr
    assert sum(faults.done.values()) >= 3
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
