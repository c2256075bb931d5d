"""With obstore the same arrives, proven; whatever obstore cannot do, botocore does."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from boto3.s3.transfer import TransferConfig

from crowdlayer.data.layout import belongs
from crowdlayer.errors import StoreError
from crowdlayer.storage.fast import SMALL, TRIES, FastReader, fast_reader
from crowdlayer.storage.files import Stored
from crowdlayer.storage.s3 import Bucket
from crowdlayer.storage.sync import sync
from tests.conftest import ROOT, Store, without_obstore
from tests.objects import downloaded, only, put_plain
from tests.servers import Meddler, Spoiler, cut_after, flipped, free_port, late, refused, shortened_to
from tests.trees import ODD, TREE, put


def askers(meddler: Meddler, path: str = "") -> list[str]:
    """Who asked for what has `path` in it."""
    agents = [request.headers["user-agent"] for request in meddler.requests if path in request.path]
    return ["obstore" if agent == "crowdlayer" else "botocore" for agent in agents]


def reader_of(store: Store, presigned: str) -> FastReader | None:
    return fast_reader(store.bucket, "s3://here", lambda: presigned, lambda: ("key", "secret", None), None, 10)


# --- what obstore does -----------------------------------------------------------------------------------------------


def test_a_sync_is_one_listing_and_one_request_per_object_and_the_next_is_one_listing(
    store: Store, meddler: Meddler, tmp_path: Path
) -> None:
    tree = {name: body for name, body in TREE.items() if body}
    location = put(store, tree)
    synced = sync(location, tmp_path / "work", belongs)
    assert synced.digests == {name: hashlib.sha256(body).hexdigest() for name, body in tree.items()}
    assert askers(meddler) == ["obstore"] * (1 + len(tree))
    assert sync(location, tmp_path / "work", belongs) == synced
    assert len(meddler.requests) == 2 + len(tree)


def test_a_folder_synced_with_obstore_is_known_without_it(
    store: Store, meddler: Meddler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = put(store, TREE)
    first = sync(location, tmp_path / "work", belongs)
    requests = len(meddler.requests)
    without_obstore(monkeypatch)
    assert sync(location, tmp_path / "work", belongs) == first
    assert len(meddler.requests) == requests + 1


def test_what_is_listed_and_read_is_the_same_with_and_without_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*ODD, "train/ends in a space ", "train/deep/er/x.png"]:
        store.put(f"data/{name}", name.encode())
    fast = Bucket(store.bucket, "data")
    listed = fast.listing()
    read = [downloaded(fast, stored) for stored in listed]
    without_obstore(monkeypatch)
    slow = Bucket(store.bucket, "data")
    assert slow.listing() == listed
    assert [downloaded(slow, stored) for stored in listed] == read


@pytest.mark.parametrize(
    ("key", "prefix"),
    [("data/", "data"), ("data/train/", "data"), ("data/train/x.png", "data"), ("data//x.png", "data"), ("/x.png", "")],
    ids=["marker of the prefix", "marker of a folder", "empty file", "empty part", "slash before"],
)
def test_a_key_that_obstore_shows_as_another_is_listed_by_botocore(
    key: str, prefix: str, store: Store, meddler: Meddler
) -> None:
    store.put("data/y", b"y")
    store.put(key, b"")
    expected = [name for name in ("data/y", key) if not name.endswith("/")]
    listed = Bucket(store.bucket, prefix).listing()
    assert sorted(f"{prefix}/{stored.name}".removeprefix("/" if not prefix else "") for stored in listed) == sorted(
        expected
    )
    assert askers(meddler)[-1] == "botocore"


def test_large_objects_and_those_in_parts_are_read_by_botocore(store: Store, meddler: Meddler, tmp_path: Path) -> None:
    bucket = Bucket(store.bucket, "data")
    large = put_plain(bucket, "large", os.urandom(SMALL + 1))
    small = put_plain(bucket, "small", os.urandom(SMALL))
    source = tmp_path / "parts"
    source.write_bytes(os.urandom(5 * 2**20 + 1))
    parts = TransferConfig(multipart_threshold=1, multipart_chunksize=5 * 2**20)
    store.client.upload_file(str(source), store.bucket, "data/parts", Config=parts)
    in_parts = bucket.find("parts")
    assert in_parts is not None
    meddler.requests.clear()
    for stored in (large, small, in_parts):
        downloaded(bucket, stored)
    assert askers(meddler, "/large") == ["botocore"]
    assert askers(meddler, "/small") == ["obstore"]
    assert askers(meddler, "/parts") == ["botocore", "botocore"]  # how long is a part, and the object


def test_the_token_of_a_session_is_sent(store: Store, meddler: Meddler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a token")
    store.put("data/x", b"body")
    Bucket(store.bucket, "data").listing()
    (request,) = meddler.requests
    assert askers(meddler) == ["obstore"]
    assert request.headers["x-amz-security-token"] == "a token"


def test_a_role_is_taken_by_botocore_and_used_by_obstore(
    store: Store, meddler: Meddler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("data/x", b"body")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trainer")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    (tmp_path / "token").write_text("a token")
    bucket = Bucket(store.bucket, "data")
    assert downloaded(bucket, only(bucket)) == b"body"
    assert [request.method for request in meddler.requests] == ["POST", "GET", "GET"]
    assert askers(meddler, "/data") == ["obstore"]
    credentials = bucket._session.get_credentials()
    assert credentials is not None
    assert f"Credential={credentials.access_key}/" in meddler.requests[-1].headers["authorization"]


@pytest.mark.parametrize(
    ("url", "base", "region"),
    [
        ("https://b.s3.eu-west-3.amazonaws.com/x", "https://b.s3.eu-west-3.amazonaws.com", "eu-west-3"),
        ("http://store.example:9000/b/x", "http://store.example:9000/b", "us-east-1"),
    ],
)
def test_the_bucket_is_reached_where_botocore_reaches_it(url: str, base: str, region: str, store: Store) -> None:
    fast = reader_of(store, f"{url}?X-Amz-Credential=key%2F20260101%2F{region}%2Fs3%2Faws4_request&X-Amz-Expires=3600")
    assert fast is not None
    assert fast._store is not None
    config = fast._store.config
    assert (config.get("endpoint_url_s3"), config.get("region")) == (base, region)


@pytest.mark.parametrize("without", [(), ("obstore", "obstore.store")], ids=["obstore", "botocore"])
def test_a_sync_keeps_to_the_files_that_may_be_open(
    without: tuple[str, ...], store: Store, meddler: Meddler, tmp_path: Path
) -> None:
    """Each download has its file and its connection open, and obstore asks for 128 at once."""
    location = put(store, {f"train/x-{i:03}.png": b"body" for i in range(150)})
    for i in range(150):
        meddler.spoil(late(0.3), path=f"x-{i:03}.png", times=2)
    script = f"""if True:
        import resource, sys
        from pathlib import Path
        sys.modules |= dict.fromkeys({without!r})
        from crowdlayer.storage.sync import sync
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        print(len(sync({location!r}, Path({str(tmp_path)!r}), bool).digests))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "150\n", done.stderr
    assert set(askers(meddler, "/data/train/")) == {"botocore" if without else "obstore"}


# --- what botocore does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoiler",
    [refused(503, "SlowDown"), refused(403, "AccessDenied"), cut_after(0), cut_after(3), shortened_to(3), flipped(2)],
    ids=["busy", "refused", "no answer", "cut", "short", "flipped"],
)
def test_what_obstore_cannot_read_is_read_by_botocore(spoiler: Spoiler, store: Store, meddler: Meddler) -> None:
    bucket = Bucket(store.bucket, "data")
    put_plain(bucket, "x", b"body")
    stored = only(bucket)
    meddler.requests.clear()
    meddler.spoil(spoiler, path="/x")
    assert downloaded(bucket, stored) == b"body"
    assert askers(meddler) == ["obstore", "botocore"]


@pytest.mark.parametrize("spoiler", [refused(503, "SlowDown"), cut_after(0), cut_after(40), shortened_to(0)])
def test_a_listing_that_breaks_is_asked_of_botocore(spoiler: Spoiler, store: Store, meddler: Meddler) -> None:
    store.put("data/x", b"body")
    meddler.spoil(spoiler)
    assert [stored.name for stored in Bucket(store.bucket, "data").listing()] == ["x"]
    assert askers(meddler) == ["obstore", "botocore"]


def test_obstore_that_never_succeeds_is_not_asked_for_ever(
    store: Store, meddler: Meddler, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = Bucket(store.bucket, "data")
    for i in range(TRIES + 2):
        store.put(f"data/{i}", b"body")
        meddler.spoil(flipped(0), path=f"/{i}")
    with caplog.at_level(logging.WARNING):
        assert [downloaded(bucket, stored) for stored in bucket.listing()[:TRIES]] == [b"body"] * TRIES
        meddler.requests.clear()
        assert downloaded(bucket, bucket.listing()[-1]) == b"body"
    assert "obstore" not in askers(meddler)
    assert caplog.text.count(f"s3://{store.bucket}/data: read by botocore alone, obstore cannot: ") == 1


def test_obstore_that_cannot_list_is_not_asked_for_ever(store: Store, meddler: Meddler) -> None:
    store.put("data/x", b"body")
    bucket = Bucket(store.bucket, "data")
    for n in range(TRIES + 1):
        meddler.requests.clear()
        meddler.spoil(refused(403, "AccessDenied"), times=int(n < TRIES))
        assert [stored.name for stored in bucket.listing()] == ["x"]
    assert askers(meddler) == ["botocore"]


def test_obstore_that_has_succeeded_is_asked_again(store: Store, meddler: Meddler) -> None:
    bucket = Bucket(store.bucket, "data")
    stored = put_plain(bucket, "x", b"body")
    for n in range(TRIES + 2):
        meddler.spoil(flipped(0), path="/x", times=n > 0)
        assert downloaded(bucket, stored) == b"body"
    meddler.requests.clear()
    assert downloaded(bucket, stored) == b"body"
    assert askers(meddler) == ["obstore"]


def test_a_store_that_is_away_is_a_failing_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket(store.bucket, "data")
    stored = put_plain(bucket, "x", b"body")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("crowdlayer.storage.s3.patience.attempts", 1)
    with pytest.raises(StoreError, match=r"data/x: .*Could not connect"):
        downloaded(Bucket(store.bucket, "data"), stored)


@pytest.mark.parametrize("presigned", ["", "https://[/x", "https://store.example/x?X-Amz-Credential=key"])
def test_an_address_that_obstore_cannot_take_leaves_all_to_botocore(
    presigned: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    assert reader_of(store, presigned) is None
    assert "s3://here: read by botocore alone" in caplog.text


def test_an_object_without_a_digest_is_read_by_botocore(store: Store, meddler: Meddler) -> None:
    bucket = Bucket(store.bucket, "data")
    put_plain(bucket, "x", b"body")
    meddler.forgotten.add("if-match")
    meddler.requests.clear()
    assert downloaded(bucket, Stored("x", 4, '"opaque"')) == b"body"
    assert askers(meddler) == ["botocore"]
