"""A real store, of whatever make, keeps and refuses as the one on loopback does (make store)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from crowdlayer.data.layout import belongs
from crowdlayer.errors import AccessError, DataError, SettingsError, StoreError
from crowdlayer.storage import etags, s3
from crowdlayer.storage.files import file_digest
from crowdlayer.storage.s3 import Bucket
from crowdlayer.storage.sync import sync
from tests.conftest import Store, run_job
from tests.crowds import write_shapes
from tests.objects import downloaded, only, written
from tests.servers import OTHER_USER, real_store
from tests.trees import KINDS, ODD, STRANGERS, TREE, UNSAFE, bodies, digests, outside, pack, put, state, upload

pytestmark = pytest.mark.store

MB = 2**20


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("size", [0, 11, 12_000_000])
def test_a_real_store_keeps_what_is_uploaded(
    size: int, real: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (s3, etags):
        monkeypatch.setattr(module, "PART", 5 * MB)
    source = written(tmp_path / "x", os.urandom(size))
    bucket = Bucket(real.bucket, "a prefix/ü")
    bucket.upload(source, "x +%&?#")
    stored = only(bucket)
    assert stored.etag.strip('"') == etags.expected_etag(source)
    assert ("-" in stored.etag) == (size > 5 * MB)
    with tempfile.TemporaryFile() as file:
        assert bucket.download(stored, file) == file_digest(source)
    bucket.delete("x +%&?#")
    assert bucket.find("x +%&?#") is None


@pytest.mark.usefixtures("reader")
def test_a_real_store_tells_of_a_swapped_object_and_a_missing_bucket(real: Store) -> None:
    real.put("data/x", b"body")
    bucket = Bucket(real.bucket, "data")
    stored = only(bucket)
    real.put("data/x", b"BODY")
    with pytest.raises(StoreError, match="was changed meanwhile"):
        downloaded(bucket, stored)
    with pytest.raises(SettingsError, match="the bucket must exist"):
        Bucket("there-is-no-such-bucket", "").listing()


@pytest.mark.usefixtures("reader")
def test_a_real_store_has_no_listing_of_an_endpoint_with_the_bucket_in_it(
    real: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{os.environ['AWS_ENDPOINT_URL']}/{real.bucket}")
    with pytest.raises(SettingsError, match=r"AWS_ENDPOINT_URL must be the store's, without a bucket"):
        Bucket(real.bucket, "data").listing()


@pytest.mark.usefixtures("reader")
def test_a_real_store_refuses_a_user_without_rights(
    real: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real.put("data/x", b"body")
    stored = only(Bucket(real.bucket, "data"))
    source = written(tmp_path / "x", b"x")

    def refusals() -> None:
        bucket = Bucket(real.bucket, "data")
        actions: list[Callable[[], object]] = [
            bucket.listing,
            lambda: bucket.find("x"),
            lambda: bucket.find("missing"),
            lambda: downloaded(bucket, stored),
            lambda: bucket.upload(source, "x"),
            lambda: bucket.delete("x"),
        ]
        for action in actions:
            with pytest.raises(AccessError, match=rf"{real.bucket}/data.*: the store .*403") as raised:
                action()
            assert raised.value.exit_code == 77

    other = real_store(OTHER_USER)
    if other is None:
        pytest.skip("no S3_TEST_OTHER_ACCESS_KEY")
    for name, value in other.items():
        monkeypatch.setenv(name, value)
    refusals()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refusals()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    refusals()


@pytest.mark.usefixtures("reader")
def test_a_real_store_whose_authority_is_unknown_is_a_failing_store(
    real: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "AWS_CA_BUNDLE" not in os.environ or not os.environ["AWS_ENDPOINT_URL"].startswith("https:"):
        pytest.skip("no https with an authority of its own")
    monkeypatch.delenv("AWS_CA_BUNDLE")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
        Bucket(real.bucket, "").listing()


def test_a_real_stores_prefix_comes_whole_with_odd_names(real: Store, workdir: Path) -> None:
    tree = TREE | {name: name.encode() for name in ODD if "/." not in name}
    location = put(real, tree | STRANGERS | {"": b"", "train/": b""}, "a prefix/ü+%&?#")
    synced = sync(location, workdir, belongs)
    assert synced.digests == digests(tree)
    assert bodies(workdir / "data") == tree
    before = state(workdir / "data")
    assert sync(location, workdir, belongs) == synced
    assert state(workdir / "data") == before


def test_a_real_store_keeps_unsafe_names_and_they_are_refused(real: Store, tmp_path: Path, workdir: Path) -> None:
    for name in UNSAFE:
        real.put(f"data/{name}", b"evil")
    with pytest.raises(DataError, match=r"a name must have no empty part.*a name must have no backslash"):
        sync(f"s3://{real.bucket}/data", workdir, belongs)
    assert outside(tmp_path, workdir) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_stores_archive_is_unpacked(kind: str, real: Store, tmp_path: Path, workdir: Path) -> None:
    location = upload(real, pack(tmp_path / f"data{kind}", TREE))
    assert sync(location, workdir, belongs).digests == digests(TREE)


def test_a_job_that_a_real_store_refuses_ends_with_77(
    real: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = real.put_tree(write_shapes(tmp_path / "shapes"))
    other = real_store(OTHER_USER)
    if other is None:
        pytest.skip("no S3_TEST_OTHER_ACCESS_KEY")
    for name, value in other.items():
        monkeypatch.setenv(name, value)
    done = run_job("--check", TASKS=location)
    assert done.code == 77
    assert location in done.last_line
    assert "Traceback" not in done.stderr
