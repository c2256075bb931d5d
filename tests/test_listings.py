"""A listing that contradicts itself, or the store: what is listed is brought whole, or the job ends and says why."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from crowdlayer.errors import StoreError
from crowdlayer.storage import s3
from crowdlayer.storage.s3 import Bucket
from tests.conftest import Store, without_obstore
from tests.forks import Forks
from tests.objects import downloaded
from tests.servers import Answer, Meddler, Spoiler, is_listing
from tests.test_faults import job

BODY = b"a body"
ENTRY = re.compile(rb"<Contents>.*?</Contents>", re.DOTALL)


@pytest.fixture(params=["botocore", "obstore"])
def meddler(meddler: Meddler, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Meddler:
    """The proxy, for code with obstore and without."""
    if request.param == "botocore":
        without_obstore(monkeypatch)
    monkeypatch.setattr(s3.patience, "attempts", 3)
    return meddler


def listed_twice(answer: Answer) -> None:
    if is_listing(answer) and (entries := ENTRY.findall(answer.body)):
        answer.body = answer.body.replace(entries[0], entries[0] * 2, 1)


def listed_backwards(answer: Answer) -> None:
    if is_listing(answer) and (entries := ENTRY.findall(answer.body)):
        answer.body = answer.body.replace(b"".join(entries), b"".join(reversed(entries)))


def not_listed(name: bytes) -> Spoiler:
    def spoiler(answer: Answer) -> None:
        answer.body = ENTRY.sub(lambda entry: b"" if name in entry[0] else entry[0], answer.body)

    return spoiler


def sized(difference: int) -> Spoiler:
    """All sizes are others."""

    def spoiler(answer: Answer) -> None:
        answer.body = re.sub(
            rb"<Size>([0-9]+)<", lambda size: b"<Size>%d<" % max(0, int(size[1]) + difference), answer.body
        )

    return spoiler


def cut(answer: Answer) -> None:
    """There is more, and nothing to ask for it by: a store that does not know this way of listing says so."""
    answer.body = answer.body.replace(b"<IsTruncated>false<", b"<IsTruncated>true<")


def endless(contents: bool, tokens: Callable[[], int]) -> Spoiler:
    """There is always more; the same again, or nothing."""
    first: list[bytes] = []

    def spoiler(answer: Answer) -> None:
        if not first:
            cut(answer)
            first.append(answer.body if contents else ENTRY.sub(b"", answer.body))
        more = b"<NextContinuationToken>%d</NextContinuationToken></ListBucketResult>" % tokens()
        answer.status, answer.body = 200, first[0].replace(b"</ListBucketResult>", more)

    return spoiler


def once(spoiler: Spoiler) -> Spoiler:
    """The first listing alone."""
    met: list[Answer] = []

    def spoilt(answer: Answer) -> None:
        if is_listing(answer):
            met.append(answer)
        if met == [answer]:
            spoiler(answer)

    return spoilt


@pytest.fixture
def bucket(store: Store, meddler: Meddler) -> Bucket:
    """With three objects."""
    for name in "abc":
        store.put(f"data/{name}", BODY)
    return Bucket(store.bucket, "data")


@pytest.mark.parametrize("spoiler", [listed_twice, listed_backwards], ids=["twice", "backwards"])
def test_what_is_listed_twice_or_in_another_order_is_there_once(
    spoiler: Spoiler, bucket: Bucket, meddler: Meddler
) -> None:
    meddler.spoil(spoiler, times=9)
    assert sorted(stored.name for stored in bucket.listing()) == ["a", "b", "c"]


@pytest.mark.parametrize("difference", [-len(BODY), -1, 1, 100])
def test_an_object_of_another_size_than_listed_is_a_failing_store(
    difference: int, bucket: Bucket, meddler: Meddler
) -> None:
    meddler.spoil(sized(difference), times=9)
    stored = bucket.listing()[0]
    with pytest.raises(StoreError, match=r"/data/a: (must have the listed|the store answers 416)"):
        downloaded(bucket, stored)
    assert meddler.count("GET", "/a") <= 2 + s3.patience.attempts


def test_a_listing_that_the_store_cuts_without_a_word_is_a_failing_store(
    bucket: Bucket, meddler: Meddler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crowdlayer.storage.fast.PAGE", 3)  # of so few a listing is made of full pages
    meddler.spoil(cut, times=9)
    with pytest.raises(StoreError, match=r"/data: its listing must be whole, .* ends it after 3$"):
        bucket.listing()


@pytest.mark.parametrize("contents", [True, False], ids=["with the same", "with nothing"])
@pytest.mark.parametrize("tokens", ["one token", "ever new tokens"])
@pytest.mark.parametrize("meddler", ["botocore", pytest.param("obstore", marks=pytest.mark.slow)], indirect=True)
def test_a_listing_that_never_ends_is_a_failing_store(
    tokens: str, contents: bool, bucket: Bucket, meddler: Meddler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "BARREN", 10)
    monkeypatch.setattr(s3.patience, "timeout", 5)
    numbers = itertools.repeat(7) if tokens == "one token" else itertools.count()
    meddler.spoil(endless(contents, lambda: next(numbers)), times=10**6)
    with pytest.raises(StoreError, match=r"/data: (its listing must end|.*same next token)"):
        bucket.listing()
    asked = len(meddler.requests)
    bucket.find("a")
    assert len(meddler.requests) == asked + 1  # nobody goes on asking


@pytest.mark.slow
def test_an_image_that_one_listing_lacks_is_counted_and_the_next_start_takes_the_whole_for_other_data(
    store: Store, meddler: Meddler, shapes: Path, forks: Forks
) -> None:
    """Nobody can know of it but by its answers."""
    tasks, out = store.put_tree(shapes), f"s3://{store.bucket}/out"
    meddler.spoil(once(not_listed(b"train/red/square-2.png")), times=10**6)
    lacking = job(forks, TASKS=tasks, OUTPUT=out)
    assert lacking.code == 0, lacking.stderr
    assert re.search("1 answered task", lacking.stderr), lacking.stderr
    first = json.loads(store.get("out/results/crowdlayer.json"))
    whole = job(forks, TASKS=tasks, OUTPUT=out)
    assert whole.code == 0, whole.stderr
    second = json.loads(store.get("out/results/crowdlayer.json"))
    assert (first["n_tasks"], second["n_tasks"]) == (23, 24)
    assert first["job"]["data_digest"] != second["job"]["data_digest"]
