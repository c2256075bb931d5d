"""The bytes of one object as they come: a body that breaks, or is not as long as listed, is read on or again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crowdlayer.errors import StoreError
from crowdlayer.storage import s3
from crowdlayer.storage.files import CHUNK
from crowdlayer.storage.s3 import Bucket
from tests.conftest import BOTH, Store
from tests.objects import downloaded, only, put_plain
from tests.servers import (
    Answer,
    Meddler,
    Spoiler,
    certificate,
    cut_after,
    cut_after_all,
    lengthened,
    meddling,
    refused,
    shortened_to,
)

pytestmark = pytest.mark.usefixtures("reader")

MB = 2**20


def test_a_body_that_breaks_goes_on_from_there(store: Store, meddler: Meddler) -> None:
    body = os.urandom(3 * MB)
    store.put("data/x", body)
    bucket = Bucket(store.bucket, "data")
    meddler.spoil(cut_after(2 * MB + 7), path="/x")
    assert downloaded(bucket, only(bucket)) == body
    _, first, second = meddler.requests
    assert "range" not in first.headers
    assert MB <= int(second.headers["range"].removeprefix("bytes=").removesuffix("-")) <= 2 * MB + 7
    assert second.headers["if-match"] == first.headers["if-match"]


def test_a_body_that_breaks_when_all_of_it_has_come_is_not_asked_for_again(store: Store, meddler: Meddler) -> None:
    body = os.urandom(2 * CHUNK)
    store.put("data/x", body)
    bucket = Bucket(store.bucket, "data")
    meddler.spoil(cut_after_all, path="/x", times=9)
    assert downloaded(bucket, only(bucket)) == body
    assert meddler.count("GET", "/x") == 1


@BOTH
def test_a_connection_that_ends_before_the_first_byte_is_tried_again(store: Store, meddler: Meddler) -> None:
    store.put("data/x", b"body")
    bucket = Bucket(store.bucket, "data")
    meddler.spoil(cut_after(0), path="/x", times=2)
    assert downloaded(bucket, only(bucket)) == b"body"


@BOTH
def test_garbage_on_the_line_is_tried_again(
    store: Store, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = os.urandom(300_000)
    store.put("data/x", body)
    bundle, tls = certificate(tmp_path)

    def garble(answer: Answer) -> None:
        answer.sent, answer.garbage = 100_000, b"\x17\x03\x03\x00\x20" + bytes(32)  # a record of TLS that is not one

    with meddling(endpoint, tls) as meddler:
        monkeypatch.setenv("AWS_ENDPOINT_URL", meddler.url)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
        bucket = Bucket(store.bucket, "data")
        meddler.spoil(garble, path="/x")
        assert downloaded(bucket, only(bucket)) == body
        assert meddler.count("GET", "/x") == 2


@BOTH
@pytest.mark.parametrize(
    ("once", "always", "came"),
    [(shortened_to(5), shortened_to(0), 0), (lengthened, lengthened, 13)],
    ids=["short", "long"],
)
def test_a_body_that_is_not_as_long_as_listed_is_read_again(
    once: Spoiler, always: Spoiler, came: int, store: Store, meddler: Meddler, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket(store.bucket, "data")
    put_plain(bucket, "x", b"a whole body")
    meddler.spoil(once, path="/x")
    assert downloaded(bucket, only(bucket)) == b"a whole body"
    monkeypatch.setattr(s3.patience, "attempts", 2)
    meddler.spoil(always, path="/x", times=9)
    with pytest.raises(StoreError, match=f"data/x: must have the listed 12 bytes, {came} came"):
        downloaded(bucket, only(bucket))


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_body_is_asked_for_again_where_botocore_does_not(
    status: int, store: Store, meddler: Meddler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when its quota of retries, one for all threads, is spent."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store.put("data/x", b"body")
    bucket = Bucket(store.bucket, "data")
    meddler.spoil(refused(status, "InternalError"), method="GET", path="/x", times=2)
    assert bucket.read("x") == b"body"


def test_a_body_is_not_asked_for_without_end(store: Store, meddler: Meddler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3.patience, "attempts", 3)
    store.put("data/x", b"body")
    meddler.spoil(refused(500, "InternalError"), method="GET", path="/x", times=9)
    with pytest.raises(StoreError, match="data/x: the store answers 500 to GetObject"):
        Bucket(store.bucket, "data").read("x")
    assert meddler.count("GET", "/x") == 3
