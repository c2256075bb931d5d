"""Buckets: what is put is verified, what is read is the version that was listed and no other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from crowdlayer.errors import StoreError
from crowdlayer.storage import etags, s3
from crowdlayer.storage.files import Stored
from crowdlayer.storage.s3 import Bucket
from tests.conftest import BOTH, Store
from tests.objects import downloaded, only, written
from tests.servers import Answer, Meddler, header

pytestmark = pytest.mark.usefixtures("reader")

MB = 2**20


# --- listing, finding, deleting --------------------------------------------------------------------------------------


@BOTH
def test_a_bucket_lists_what_is_below_the_prefix_without_markers_of_folders(store: Store) -> None:
    for key in ("data/", "data/b/", "data/b/x", "data/a b+c%20é&?#", "database/y", "data"):
        store.put(key, b"12" if key[-1] != "/" else b"")
    etag = f'"{hashlib.md5(b"12").hexdigest()}"'
    assert Bucket(store.bucket, "data").listing() == [Stored("a b+c%20é&?#", 2, etag), Stored("b/x", 2, etag)]
    assert [s.name for s in Bucket(store.bucket, "").listing()] == [
        "data",
        "data/a b+c%20é&?#",
        "data/b/x",
        "database/y",
    ]


def test_a_listing_goes_over_all_its_pages(store: Store, meddler: Meddler) -> None:
    for i in range(10):
        store.put(f"data/{i}", b"")
    meddler.added = "&max-keys=4"
    assert [s.name for s in Bucket(store.bucket, "data").listing()] == [f"{i}" for i in range(10)]
    assert meddler.count("GET") == 3


@BOTH
def test_a_bucket_finds_and_reads_its_objects_and_misses_others(store: Store) -> None:
    store.put("data/x", b"body")
    store.put("data/empty", b"")
    bucket = Bucket(store.bucket, "data")
    assert bucket.find("x") == Stored("x", 4, f'"{hashlib.md5(b"body").hexdigest()}"')
    assert bucket.read("x") == b"body"
    assert bucket.read("empty") == b""
    assert bucket.find("y") is None
    assert bucket.read("y") is None


def test_an_object_that_is_not_there_can_be_deleted(store: Store) -> None:
    store.put("data/x", b"body")
    for _ in range(2):
        Bucket(store.bucket, "data").delete("x")
    assert store.keys() == []


# --- uploading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_an_upload_to_a_bucket_is_verified_by_its_etag(
    size: int, store: Store, meddler: Meddler, tmp_path: Path
) -> None:
    body = os.urandom(size)
    bucket = Bucket(store.bucket, "out")
    bucket.upload(written(tmp_path / "x", body), "deep/x")
    assert store.get("out/deep/x") == body
    assert (meddler.count("PUT"), meddler.count("HEAD"), meddler.count("GET")) == (1, 1, 0)


@pytest.mark.parametrize("size", [5 * MB - 1, 5 * MB, 12_000_000])
def test_the_etag_of_an_upload_in_parts_is_foretold(
    size: int, store: Store, meddler: Meddler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (s3, etags):
        monkeypatch.setattr(module, "PART", 5 * MB)
    source = written(tmp_path / "x", os.urandom(size))
    bucket = Bucket(store.bucket, "out")
    bucket.upload(source, "x")
    assert meddler.count("GET") == 0  # nothing had to be read back
    stored = only(bucket)
    assert ("-" in stored.etag) == (size >= 5 * MB)
    assert downloaded(bucket, stored) == source.read_bytes()


def test_an_upload_whose_etag_says_nothing_is_read_back(
    store: Store, meddler: Meddler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = Bucket(store.bucket, "out")
    meddler.forgotten.add("if-match")
    meddler.spoil(header("ETag", '"0123456789abcdef-1"'), method="HEAD")
    bucket.upload(written(tmp_path / "x", b"body"), "x")
    assert meddler.count("GET") == 1
    meddler.spoil(header("ETag", '"an opaque word"'), method="HEAD")
    bucket.upload(tmp_path / "x", "x")
    assert meddler.count("GET") == 2
    assert "the store gives no digest of it" in caplog.text


def test_an_upload_that_came_out_wrong_is_noticed(
    store: Store, meddler: Meddler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = Bucket(store.bucket, "out")

    def swap(body: bytes) -> Callable[[Answer], None]:
        return lambda answer: store.put("out/x", body)

    source = written(tmp_path / "x", b"body")
    meddler.spoil(swap(b"shorter or longer"), method="PUT")
    with pytest.raises(StoreError, match="out/x: must be there as uploaded"):
        bucket.upload(source, "x")
    meddler.spoil(swap(b"BODY"), method="PUT")
    with pytest.raises(StoreError, match="out/x: what was uploaded must read back the same"):
        bucket.upload(source, "x")


def test_an_upload_of_nothing_at_all_names_the_source(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="gone: No such file"):
        Bucket(store.bucket, "out").upload(tmp_path / "gone", "x")
    assert store.keys() == []


# --- downloading -----------------------------------------------------------------------------------------------------


@BOTH
def test_an_object_swapped_after_the_listing_is_noticed(reader: str, store: Store, meddler: Meddler) -> None:
    store.put("data/x", b"body")
    bucket = Bucket(store.bucket, "data")
    stored = only(bucket)
    store.put("data/x", b"BODY")
    with pytest.raises(StoreError, match="data/x: must stay as it was listed, was changed meanwhile"):
        downloaded(bucket, stored)
    assert meddler.count("GET", "/x") == (1 if reader == "botocore" else 2)  # no use in asking the same one again


@BOTH
def test_an_object_swapped_while_it_is_read_is_noticed(store: Store, meddler: Meddler) -> None:
    store.put("data/x", bytes(200_000))
    bucket = Bucket(store.bucket, "data")
    stored = only(bucket)

    def swap(answer: Answer) -> None:
        answer.sent = 100_000
        store.put("data/x", b"1" * 200_000)

    meddler.spoil(swap, path="/x")
    with pytest.raises(StoreError, match="was changed meanwhile"):
        downloaded(bucket, stored)


@BOTH
def test_an_object_deleted_after_the_listing_is_a_failing_store(store: Store) -> None:
    store.put("data/x", b"body")
    bucket = Bucket(store.bucket, "data")
    stored = only(bucket)
    bucket.delete("x")
    with pytest.raises(StoreError, match="data/x: the store answers 404 NoSuchKey"):
        downloaded(bucket, stored)
