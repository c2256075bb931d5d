"""What ETags and checksums prove of the bytes: one that is another is found and healed by another reading."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path

import pytest
from boto3.s3.transfer import TransferConfig

from crowdlayer.errors import StoreError
from crowdlayer.storage import s3
from crowdlayer.storage.files import Stored
from crowdlayer.storage.s3 import Bucket
from tests.conftest import BOTH, Store
from tests.objects import downloaded, only, put_plain, written
from tests.servers import Answer, Meddler, bit_flipped, flipped, header

pytestmark = pytest.mark.usefixtures("reader")

MB = 2**20


def test_a_flipped_byte_is_found_and_healed_by_another_reading(
    store: Store, meddler: Meddler, caplog: pytest.LogCaptureFixture
) -> None:
    body = os.urandom(100_000)
    bucket = Bucket(store.bucket, "data")
    put_plain(bucket, "x", body)
    meddler.spoil(flipped(50_000), path="/x")
    with caplog.at_level(logging.WARNING):
        assert downloaded(bucket, only(bucket)) == body
    assert "data/x: its MD5 is not its ETag" in caplog.text


@BOTH
def test_a_body_that_is_always_different_is_a_failing_store(
    store: Store, meddler: Meddler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3.patience, "attempts", 3)
    bucket = Bucket(store.bucket, "data")
    put_plain(bucket, "x", bytes(100))
    for position in range(100):
        meddler.spoil(flipped(position), path="/x")
    with pytest.raises(StoreError, match="data/x: must read the same twice"):
        downloaded(bucket, only(bucket))
    assert 3 <= meddler.count("GET", "/x") < 10


@BOTH
def test_an_etag_that_only_looks_like_an_md5_is_outvoted_by_two_equal_readings(
    reader: str, store: Store, meddler: Meddler, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = Bucket(store.bucket, "data")
    put_plain(bucket, "x", b"encrypted at rest")
    meddler.forgotten.add("if-match")
    meddler.spoil(header("ETag", f'"{"0a" * 16}"'), method="HEAD")
    stored = bucket.find("x")
    assert stored is not None
    with caplog.at_level(logging.WARNING):
        assert downloaded(bucket, stored) == b"encrypted at rest"
    assert meddler.count("GET", "/x") == (2 if reader == "botocore" else 3)  # obstore is asked first
    assert "data/x: its MD5 is not its ETag" in caplog.text


@BOTH
def test_a_checksum_of_the_store_is_heeded(store: Store, meddler: Meddler) -> None:
    body = os.urandom(100_000)
    store.client.put_object(Bucket=store.bucket, Key="data/x", Body=body, ChecksumAlgorithm="CRC32")
    bucket = Bucket(store.bucket, "data")
    answer = bucket.client.get_object(Bucket=store.bucket, Key="data/x", ChecksumMode="ENABLED")
    answer["Body"].read()
    assert answer["ChecksumCRC32"]
    stored = Stored("x", len(body), only(bucket).etag)
    meddler.spoil(flipped(7), path="/x")
    assert downloaded(bucket, stored) == body


@BOTH
@pytest.mark.parametrize(
    ("name", "value"),
    [("x-amz-checksum-crc64nvme", "AAAAAAAAAAA="), ("x-amz-checksum-sha256", f"{'A' * 43}=-3")],
    ids=["of a kind that botocore has no code for", "of the checksums of parts"],
)
def test_a_checksum_that_nobody_compares_proves_nothing(name: str, value: str, store: Store, meddler: Meddler) -> None:
    body = os.urandom(100_000)
    bucket = Bucket(store.bucket, "data")
    stored = put_plain(bucket, "x", body)

    def spoiled(answer: Answer) -> None:
        flipped(7)(answer)
        header(name, value)(answer)

    meddler.spoil(spoiled, path="/x")
    assert downloaded(bucket, stored) == body


@pytest.mark.parametrize("part", [5 * MB, 8 * MB, 7 * MB + 1])
@pytest.mark.parametrize("flip", [False, True])
def test_an_object_in_parts_is_compared_with_the_md5s_of_its_parts(
    part: int, flip: bool, store: Store, meddler: Meddler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = os.urandom(17 * MB)
    store.client.upload_file(
        str(written(tmp_path / "x", body)), store.bucket, "data/x",
        Config=TransferConfig(multipart_threshold=part, multipart_chunksize=part),
    )  # fmt: skip
    bucket = Bucket(store.bucket, "data")
    stored = only(bucket)
    assert stored.etag.endswith('-3"') or stored.etag.endswith('-4"')
    if flip:
        meddler.spoil(flipped(16 * MB), path="/x")
    with caplog.at_level(logging.WARNING):
        assert downloaded(bucket, stored) == body
    told = "data/x: its MD5 is not its ETag" in caplog.text
    assert told == flip or part == 7 * MB + 1  # a size that nobody can guess, and moto does not tell
    assert meddler.count("GET", "/x") == 1 + told + (flip and part == 7 * MB + 1)


@BOTH
def test_a_store_without_digests_is_named_once(
    store: Store, meddler: Meddler, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = Bucket(store.bucket, "data")
    meddler.forgotten.add("if-match")
    for name in ("x", "y"):
        put_plain(bucket, name, b"body")
        assert downloaded(bucket, Stored(name, 4, '"opaque"')) == b"body"
    assert caplog.text.count("the store gives no digest of it and its like: only their sizes are compared") == 1


@pytest.mark.parametrize(
    ("n", "parts"), [(40, 1), (6, 3), *(pytest.param(2000, parts, marks=pytest.mark.slow) for parts in (1, 3))]
)
def test_every_flipped_bit_is_found_and_no_clean_transfer_is_suspected(
    n: int, parts: int, store: Store, meddler: Meddler, caplog: pytest.LogCaptureFixture
) -> None:
    """The transfers alternate: one flipped, which another reading heals, one clean."""
    rng = random.Random(n + parts)
    bucket = Bucket(store.bucket, "data")
    bodies = [rng.randbytes(5 * MB if part < parts - 1 else 4096) for part in range(parts)]
    body = b"".join(bodies)
    if parts == 1:
        put_plain(bucket, "x", body)
    else:
        upload = store.client.create_multipart_upload(Bucket=store.bucket, Key="data/x")["UploadId"]
        store.client.complete_multipart_upload(
            Bucket=store.bucket,
            Key="data/x",
            UploadId=upload,
            MultipartUpload={
                "Parts": [
                    {
                        "PartNumber": i,
                        "ETag": store.client.upload_part(
                            Bucket=store.bucket, Key="data/x", UploadId=upload, PartNumber=i, Body=part
                        )["ETag"],
                    }
                    for i, part in enumerate(bodies, 1)
                ]
            },
        )
    stored = only(bucket)
    for number in range(n):
        caplog.clear()
        if number % 2:
            meddler.spoil(bit_flipped(rng.randrange(8 * len(body))), path="/x")
        assert downloaded(bucket, stored) == body
        assert ("its MD5 is not its ETag" in caplog.text) == bool(number % 2)
