"""Folders and buckets: what is put is whole, what is read is what was listed, and every refusal has its type."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from boto3.s3.transfer import TransferConfig
from botocore.utils import parse_timestamp

from crowdlayer.errors import AccessError, SettingsError, StoreError
from crowdlayer.storage import etags, s3, s3_session
from crowdlayer.storage.files import CHUNK, Stored, disk_errors, file_digest
from crowdlayer.storage.places import Folder, place
from crowdlayer.storage.s3 import Bucket
from crowdlayer.storage.workdir import working_folder
from tests.conftest import ROOT, Store, without_obstore
from tests.servers import (
    OTHER_USER,
    Answer,
    Meddler,
    Spoiler,
    bit_flipped,
    certificate,
    cut_after,
    cut_after_all,
    flipped,
    free_port,
    header,
    lengthened,
    meddling,
    real_store,
    refused,
    shortened_to,
)

MB = 2**20
BOTH = pytest.mark.parametrize("reader", ["botocore", "obstore"], indirect=True)
"""The same comes of it whether obstore is installed or not."""


@pytest.fixture(autouse=True)
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who reads: botocore alone, unless a test says otherwise."""
    name: str = getattr(request, "param", "botocore")
    if name == "botocore":
        without_obstore(monkeypatch)
    return name


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder that may be read but not written. Root may do everything: the test runs as a user who may not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


def forbid(path: Path, mode: int = 0) -> None:
    """Change the mode as the owner, whoever this test runs as."""
    user = os.geteuid()
    if os.getuid() == 0:
        os.seteuid(0)
    path.chmod(mode)
    os.seteuid(user)


def written(path: Path, body: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    return path


def downloaded(bucket: Bucket, stored: Stored) -> bytes:
    """What a download gives; its digest is checked on the way."""
    with tempfile.TemporaryFile() as file:
        digest = bucket.download(stored, file)
        file.seek(0)
        body = file.read()
    assert digest == hashlib.sha256(body).hexdigest()
    return body


def put_plain(bucket: Bucket, name: str, body: bytes) -> Stored:
    """An object without a checksum of the store's, so that its MD5 has to do."""
    bucket.client.put_object(Bucket=bucket.bucket, Key=bucket.prefix + name, Body=body)
    stored = bucket.find(name)
    assert stored is not None
    return stored


def only(bucket: Bucket) -> Stored:
    (stored,) = bucket.listing()
    return stored


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "bucket", "prefix", "shown"),
    [
        ("s3://b", "b", "", "s3://b"),
        ("s3://b/", "b", "", "s3://b"),
        ("s3://b/data", "b", "data/", "s3://b/data"),
        ("s3://b/a/data/", "b", "a/data/", "s3://b/a/data"),
    ],
)
def test_an_s3_uri_names_a_bucket_and_a_prefix_with_or_without_slashes(
    location: str, bucket: str, prefix: str, shown: str
) -> None:
    found = place(location)
    assert isinstance(found, Bucket)
    assert (found.bucket, found.prefix, found.location) == (bucket, prefix, shown)


def test_anything_else_names_a_folder(tmp_path: Path) -> None:
    found = place(str(tmp_path))
    assert isinstance(found, Folder)
    assert (found.path, found.location) == (tmp_path, str(tmp_path))


@pytest.mark.parametrize(
    "value",
    ["Tue, 24 Nov 2026 03:54:10 GMT", "2026-11-24T03:54:10.120Z", "Tue, 24 Nov 2026 03:54:10 +0200", "1795492450"],
)
def test_a_time_is_read_as_botocore_reads_it(value: str) -> None:
    assert s3_session._timestamp(value) == parse_timestamp(value)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_lists_all_files_below_with_their_sizes(tmp_path: Path) -> None:
    written(tmp_path / "b" / "two.txt", b"22")
    written(tmp_path / "one", b"1")
    (tmp_path / "empty").mkdir()
    assert Folder(tmp_path).listing() == [Stored("b/two.txt", 2, ""), Stored("one", 1, "")]


def test_links_in_a_folder_are_followed_and_a_loop_ends(tmp_path: Path) -> None:
    written(tmp_path / "elsewhere" / "x.png", b"x")
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "train" / "file.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "data" / "train" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "train" / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "data" / "itself").symlink_to("itself")
    names = [stored.name for stored in Folder(tmp_path / "data").listing()]
    assert names == ["train/file.png", "train/linked/x.png"]


def test_a_folder_that_two_links_lead_to_is_there_twice(tmp_path: Path) -> None:
    written(tmp_path / "val" / "cat" / "x.png", b"x")
    (tmp_path / "test").symlink_to("val")
    assert [stored.name for stored in Folder(tmp_path).listing()] == ["test/cat/x.png", "val/cat/x.png"]


def test_a_folder_that_is_not_entered_is_not_read(tmp_path: Path) -> None:
    for name in ("lost+found/#12", "train/lost+found/x", "train/x"):
        written(tmp_path / name, b"")
    names = [stored.name for stored in Folder(tmp_path).listing(lambda name: name == "train")]
    assert names == ["train/x"]


def test_a_file_in_the_place_of_a_folder_is_a_wrong_setting(tmp_path: Path) -> None:
    source = written(tmp_path / "file", b"x")
    for location in (source, source / "deeper"):
        with pytest.raises(SettingsError, match=f"{location}: must be a folder, a file is in its place: {source}$"):
            Folder(location).upload(source, "results/x")


def test_a_folder_that_is_not_there_is_a_wrong_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nothing: must be a folder, an s3:// URI or an archive"):
        Folder(tmp_path / "nothing").listing()


def test_a_folder_finds_and_reads_its_files_and_misses_others(tmp_path: Path) -> None:
    written(tmp_path / "a" / "x", b"body")
    folder = Folder(tmp_path)
    assert folder.find("a/x") == Stored("a/x", 4, "")
    assert folder.read("a/x") == b"body"
    for missing in ("a/y", "a", "a/x/y"):
        assert folder.find(missing) is None
        assert folder.read(missing) is None


def test_a_folder_copies_a_file_with_its_digest(tmp_path: Path) -> None:
    body = os.urandom(3 * MB + 1)
    written(tmp_path / "x", body)
    with tempfile.TemporaryFile() as file:
        assert Folder(tmp_path).download(Stored("x", len(body), ""), file) == hashlib.sha256(body).hexdigest()
        file.seek(0)
        assert file.read() == body


@pytest.mark.parametrize("body", [b"", b"small", os.urandom(3 * MB)], ids=["empty", "small", "three chunks"])
def test_an_upload_to_a_folder_is_whole_and_leaves_no_litter(tmp_path: Path, body: bytes) -> None:
    source = written(tmp_path / "source", body)
    out = Folder(tmp_path / "out")
    for _ in range(2):  # the second replaces the first
        out.upload(source, "results/run.json")
    assert out.read("results/run.json") == body
    assert [stored.name for stored in out.listing()] == ["results/run.json"]


def test_an_upload_to_a_folder_is_never_half_visible(tmp_path: Path) -> None:
    old, new = written(tmp_path / "old", b"o" * 8 * MB), written(tmp_path / "new", b"n" * 8 * MB)
    out = Folder(tmp_path / "out")
    out.upload(old, "x")
    seen: set[bytes] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            body = (tmp_path / "out" / "x").read_bytes()
            seen.add(body[:1] + str(len(body)).encode() + bytes({body[-1]}))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for source in (new, old, new, old):
        out.upload(source, "x")
    done.set()
    watcher.join()
    assert seen <= {b"o8388608o", b"n8388608n"}


def test_an_upload_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    out = Folder(tmp_path / "out")
    out.upload(written(tmp_path / "source", b"old"), "x")
    with pytest.raises(StoreError, match="No such file"):
        out.upload(tmp_path / "gone", "x")
    assert out.read("x") == b"old"
    assert [stored.name for stored in out.listing()] == ["x"]


def test_an_upload_that_fails_leaves_no_folder_that_was_not_there(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for folder in ("there", "new"):
        with pytest.raises(StoreError, match="No such file"):
            Folder(tmp_path / folder).upload(tmp_path / "gone", "results/crowdlayer/.probe")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["there"]


def test_a_disk_that_fails_on_the_way_to_a_file_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, flushed = written(tmp_path / "source", b"x"), os.fsync

    def failing(descriptor: int) -> None:
        if (tmp_path / "out/results").exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        flushed(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StoreError, match=r"out/results/crowdlayer/x\.json: Input/output error"):
        Folder(tmp_path / "out").upload(source, "results/crowdlayer/x.json")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_another_run_tidies_away_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elements of an array begin at once in one output, which each of them leaves as it was before its probe."""
    results, flushed, others = tmp_path / "out/results", os.fsync, iter(range(5))

    def meanwhile(descriptor: int) -> None:
        flushed(descriptor)
        if results.exists() and next(others, None) is not None:
            results.rmdir()

    monkeypatch.setattr(os, "fsync", meanwhile)
    Folder(tmp_path / "out").upload(written(tmp_path / "source", b"x"), "results/run/.probe")
    assert (results / "run/.probe").read_bytes() == b"x"
    assert next(others, None) is None


def test_folders_that_are_empty_go_and_others_stay(tmp_path: Path) -> None:
    folder = place(str(tmp_path))
    for kept in ("a", "a/b/c"):
        (tmp_path / kept).mkdir(parents=True)
    (tmp_path / "a/file").touch()
    folder.prune("a/b/c")
    folder.prune("never/there")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file"]


def test_a_working_folder_is_free_when_its_job_has_ended(tmp_path: Path) -> None:
    for _ in range(2):
        with working_folder(str(tmp_path)) as path:
            with pytest.raises(StoreError, match="another job is using"), working_folder(str(tmp_path)):
                pass
            assert path == tmp_path


KILLED = """
import os, sys
from crowdlayer.storage.workdir import working_folder
with working_folder(None) as folder:
    (folder / "data").touch()
    print(folder, flush=True)
    if sys.argv[1:]:
        sys.stdin.read()
    os._exit(9)
"""


def test_what_a_killed_job_has_left_is_removed_by_the_next_and_what_another_uses_is_not(tmp_path: Path) -> None:
    def started(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, *arguments]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment)

    (tmp_path / "crowdlayer-kept-x").mkdir()
    with started("and waits") as living:
        assert living.stdout is not None
        used = Path(living.stdout.readline().strip())
        with started() as killed:
            left = Path(killed.communicate()[0].strip())
        assert {path.name for path in tmp_path.iterdir()} == {used.name, left.name, "crowdlayer-kept-x"}
        with started() as killed:
            again = Path(killed.communicate()[0].strip())
        assert {path.name for path in tmp_path.iterdir()} == {used.name, again.name, "crowdlayer-kept-x"}
        assert (used / "data").exists()


def test_a_thread_that_deletes_takes_no_folder_away_from_one_that_uploads(tmp_path: Path) -> None:
    """Checkpoints are put and deleted in a thread of their own while the results are put."""
    out, source, over = Folder(tmp_path / "out"), written(tmp_path / "source", b"x"), threading.Event()

    def checkpoints() -> None:
        for number in range(10_000):
            out.upload(source, f"checkpoints/{number}")
            out.delete(f"checkpoints/{number}")
            if over.is_set():
                return

    thread = threading.Thread(target=checkpoints)
    thread.start()
    try:
        for number in range(200):
            out.upload(source, f"results/{number}/report.html")
    finally:
        over.set()
        thread.join()
    assert len(out.below("results")) == 200


def test_an_uploaded_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    source = written(tmp_path / "source", b"x")
    source.chmod(0o600)
    mask = os.umask(0o027)
    try:
        Folder(tmp_path / "out").upload(source, "x")
    finally:
        assert os.umask(mask) == 0o027
    assert (tmp_path / "out" / "x").stat().st_mode & 0o777 == 0o640


def test_a_name_may_be_as_long_as_the_disk_allows(tmp_path: Path) -> None:
    name = "n" * 250 + ".json"
    Folder(tmp_path / "out").upload(written(tmp_path / "source", b"x"), name)
    assert (tmp_path / "out" / name).read_bytes() == b"x"


def test_a_file_where_a_folder_is_needed_is_a_failing_disk(tmp_path: Path) -> None:
    source = written(tmp_path / "results", b"a file")
    with pytest.raises(StoreError, match=r"results/run.json: ") as raised:
        Folder(tmp_path).upload(source, "results/run.json")
    assert raised.value.exit_code == 74
    (tmp_path / "out" / "x").mkdir(parents=True)
    with pytest.raises(StoreError, match="x: Is a directory"):
        Folder(tmp_path / "out").upload(source, "x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]


def test_a_file_that_is_not_there_can_be_deleted(tmp_path: Path) -> None:
    written(tmp_path / "x", b"x")
    for _ in range(2):
        Folder(tmp_path).delete("x")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written_is_refused_access(nobody: Path) -> None:
    source = Path(__file__)
    for name in ("x", "results/x"):
        with pytest.raises(AccessError, match="must be accessible: Permission denied") as raised:
            Folder(nobody).upload(source, name)
        assert raised.value.exit_code == 77
    assert list(nobody.iterdir()) == []


def test_a_folder_that_may_not_be_read_is_refused_access(nobody: Path) -> None:
    forbid(nobody)
    folder, below = Folder(nobody), Folder(nobody / "below")
    actions: list[Callable[[], object]] = [
        folder.listing,
        below.listing,
        lambda: folder.find("x"),
        lambda: folder.read("x"),
        lambda: folder.delete("x"),
    ]
    for action in actions:
        with pytest.raises(AccessError, match="Permission denied"):
            action()


def test_a_disk_that_is_read_only_is_refused_access() -> None:
    with pytest.raises(AccessError, match="out: must be writable: Read-only file system"), disk_errors("out"):
        raise OSError(30, "Read-only file system")


def test_a_full_disk_is_a_failing_store() -> None:
    with (
        pytest.raises(StoreError, match="out/x: No space left on device"),
        disk_errors("out/x"),
        Path("/dev/full").open("wb") as full,
    ):
        full.write(b"x")


# --- the client ------------------------------------------------------------------------------------------------------


def test_checksums_are_sent_only_where_they_are_required(store: Store, meddler: Meddler, tmp_path: Path) -> None:
    bucket = Bucket(store.bucket, "")
    config = bucket.client.meta.config
    assert config.request_checksum_calculation == "when_required"  # type: ignore[attr-defined]
    assert config.response_checksum_validation == "when_required"  # type: ignore[attr-defined]
    bucket.upload(written(tmp_path / "x", b"x"), "x")
    (put,) = [request for request in meddler.requests if request.method == "PUT"]
    assert not [name for name in put.headers if "checksum" in name or "trailer" in name]


@pytest.mark.parametrize("how", ["environment", "config file"])
def test_the_user_may_ask_for_checksums(
    how: str, store: Store, meddler: Meddler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "environment":
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported")
        monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_supported")
    else:
        said = (
            "[default]\nrequest_checksum_calculation = when_supported\nresponse_checksum_validation = when_supported\n"
        )
        monkeypatch.setenv("AWS_CONFIG_FILE", str(written(tmp_path / "config", said.encode())))
    bucket = Bucket(store.bucket, "")
    assert bucket.client.meta.config.response_checksum_validation == "when_supported"  # type: ignore[attr-defined]
    bucket.upload(written(tmp_path / "x", b"x"), "x")
    (put,) = [request for request in meddler.requests if request.method == "PUT"]
    assert "x-amz-checksum-crc32" in put.headers


def test_requests_are_signed_the_new_way(store: Store, meddler: Meddler) -> None:
    bucket = Bucket(store.bucket, "")
    bucket.listing()
    assert meddler.requests[0].headers["authorization"].startswith("AWS4-HMAC-SHA256")
    url = bucket.client.generate_presigned_url("get_object", Params={"Bucket": store.bucket, "Key": "x"})
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in url


def test_requests_are_tried_eight_times_unless_the_environment_says_otherwise(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def retries() -> object:
        return Bucket(store.bucket, "").client.meta.config.retries  # type: ignore[attr-defined]

    assert retries() == {"mode": "standard", "total_max_attempts": 8}
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    assert retries() == {"mode": "standard", "total_max_attempts": 3}
    monkeypatch.setenv("AWS_RETRY_MODE", "adaptive")
    assert retries() == {"mode": "adaptive", "total_max_attempts": 3}


@pytest.mark.parametrize(
    ("variables", "region"),
    [
        ({}, "us-east-1"),
        ({"AWS_REGION": "eu-west-3"}, "eu-west-3"),
        ({"AWS_DEFAULT_REGION": "eu-west-3"}, "eu-west-3"),
        ({"AWS_REGION": "eu-west-3", "AWS_DEFAULT_REGION": "sa-east-1"}, "eu-west-3"),
    ],
)
def test_the_region_is_the_environments_else_what_most_stores_take(
    variables: dict[str, str], region: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_REGION")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Bucket(store.bucket, "").client.meta.region_name == region


@pytest.mark.parametrize(
    ("style", "url"), [("virtual", "http://{0}.store.example:9000/x?"), ("path", "http://store.example:9000/{0}/x?")]
)
def test_the_way_of_addressing_is_botocores_to_say(
    style: str, url: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"[default]\ns3 =\n  addressing_style = {style}\n"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(written(tmp_path / "config", said.encode())))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store.example:9000")
    client = Bucket(store.bucket, "").client
    signed = client.generate_presigned_url("get_object", Params={"Bucket": store.bucket, "Key": "x"})
    assert signed.startswith(url.format(store.bucket))


@BOTH
def test_over_https_an_upload_is_one_plain_body_and_the_named_authority_is_trusted(
    store: Store, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, tls = certificate(tmp_path)
    body = os.urandom(100_000)
    with meddling(endpoint, tls) as meddler:
        monkeypatch.setenv("AWS_ENDPOINT_URL", meddler.url)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
        bucket = Bucket(store.bucket, "out")
        bucket.upload(written(tmp_path / "x", body), "x")
        assert bucket.read("x") == body
        (put,) = [request for request in meddler.requests if request.method == "PUT"]
    assert put.headers["content-length"] == "100000"
    assert not {"transfer-encoding", "content-encoding", "x-amz-trailer"} & put.headers.keys()


@BOTH
def test_a_store_whose_certificate_is_not_trusted_is_named(
    store: Store, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    source = written(tmp_path / "source", b"x")
    with meddling(endpoint, certificate(tmp_path)[1]) as meddler:
        monkeypatch.setenv("AWS_ENDPOINT_URL", meddler.url)
        bucket = Bucket(store.bucket, "out")
        for action in (bucket.listing, lambda: bucket.find("x"), lambda: bucket.upload(source, "x")):
            with pytest.raises(StoreError, match=rf"^s3://{store.bucket}/out.*CERTIFICATE_VERIFY_FAILED"):
                action()
        assert meddler.requests == []


@BOTH
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL", "no url"),
        ("AWS_CA_BUNDLE", "/nowhere/ca.crt"),
        ("AWS_PROFILE", "nobody"),
        ("AWS_REGION", "no region!"),
        ("AWS_MAX_ATTEMPTS", "many"),
        ("AWS_RETRY_MODE", "sometimes"),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "perhaps"),
    ],
)
def test_a_variable_of_aws_that_is_wrong_is_a_wrong_setting(
    name: str, value: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "AWS_CA_BUNDLE":
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{free_port()}")
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as raised:
        Bucket(store.bucket, "").listing()
    assert str(raised.value).startswith(f"s3://{store.bucket}: ")
    assert "\n" not in str(raised.value)


@BOTH
def test_without_credentials_access_is_refused(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path / "x", b"x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    bucket = Bucket(store.bucket, "")
    for action in (bucket.listing, lambda: bucket.find("x"), lambda: bucket.upload(source, "x")):
        with pytest.raises(AccessError, match="credentials are needed"):
            action()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "half")
    with pytest.raises(AccessError, match="credentials are needed"):
        Bucket(store.bucket, "").listing()


@BOTH
@pytest.mark.parametrize("why", ["no token", "403 AccessDenied", "400 InvalidIdentityToken"])
def test_a_role_that_cannot_be_had_is_refused_access(
    why: str, store: Store, meddler: Meddler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trainer")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    if why != "no token":
        written(tmp_path / "token", b"a token")
        status, code = why.split()
        meddler.spoil(refused(int(status), code, sts=True), method="POST")
    expected = "credentials are needed: .*/token'" if why == "no token" else why
    with pytest.raises(AccessError, match=rf"^s3://{store.bucket}: .*{expected}"):
        Bucket(store.bucket, "").listing()
    written(tmp_path / "token", b"a token")
    assert Bucket(store.bucket, "").listing() == []


@BOTH
def test_a_store_that_cannot_be_reached_is_a_failing_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match="Could not connect") as raised:
        Bucket(store.bucket, "").listing()
    assert raised.value.exit_code == 74


# --- buckets: listing, finding, deleting -----------------------------------------------------------------------------


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
def test_a_bucket_that_is_not_there_is_a_wrong_setting(store: Store, tmp_path: Path) -> None:
    bucket = Bucket("there-is-no-such-bucket", "data")
    with pytest.raises(SettingsError, match=r"the bucket must exist, 'there-is-no-such-bucket' does not") as raised:
        bucket.listing()
    assert raised.value.exit_code == 78
    with pytest.raises(SettingsError, match="the bucket must exist"):
        bucket.upload(written(tmp_path / "x", b"x"), "x")
    for impossible in ("", "Not A Bucket"):
        with pytest.raises(SettingsError, match="bucket"):
            Bucket(impossible, "").listing()


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


@pytest.mark.parametrize(("hours", "told"), [(1, "60 min behind"), (-30, "30.0 h ahead of"), (0, None)])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_clock_that_is_wrong_is_named_where_the_store_refuses_for_it(
    method: str, hours: int, told: str | None, store: Store, meddler: Meddler
) -> None:
    """By the date of the answer: a HEAD's has no code."""

    def refuse(answer: Answer) -> None:
        refused(403, "RequestTimeTooSkewed")(answer)
        header("Date", formatdate(time.time() + 3600 * hours, usegmt=True))(answer)

    meddler.spoil(refuse, method=method, times=9)
    bucket = Bucket(store.bucket, "data")
    with pytest.raises(AccessError) as raised:
        bucket.listing() if method == "GET" else bucket.find("x")
    said = str(raised.value)
    assert "the store must allow this, it answers 403" in said
    assert ("clock" in said) == (told is not None)
    if told is not None:
        assert said.endswith(f"; this machine's clock must be right, it is {told} the store's")


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (401, "Unauthorized"), (400, "ExpiredToken")])
def test_a_store_that_refuses_names_the_key_and_the_reason(
    status: int, code: str, store: Store, meddler: Meddler, tmp_path: Path
) -> None:
    store.put("data/x", b"body")
    bucket = Bucket(store.bucket, "data")
    stored = only(bucket)
    source = written(tmp_path / "y", b"y")
    actions: list[tuple[str, str, Callable[[], object]]] = [
        ("GET", "", bucket.listing),
        ("GET", "/x", lambda: downloaded(bucket, stored)),
        ("PUT", "/y", lambda: bucket.upload(source, "y")),
        ("DELETE", "/x", lambda: bucket.delete("x")),
    ]
    for method, suffix, action in actions:
        meddler.spoil(refused(status, code), method=method, times=1 + (code == "ExpiredToken"))
        with pytest.raises(AccessError, match=f"{store.bucket}/data{suffix}: the store .*{status} {code}") as raised:
            action()
        assert raised.value.exit_code == 77
    if status != 400:  # the answer to HEAD has no body, so no code
        meddler.spoil(refused(status, code), method="HEAD", times=2)
        with pytest.raises(AccessError, match=f"data/x: the store .*{status}"):
            bucket.find("x")


def test_a_store_that_is_busy_is_asked_again(store: Store, meddler: Meddler, tmp_path: Path) -> None:
    bucket = Bucket(store.bucket, "data")
    for method in ("PUT", "HEAD", "GET"):
        meddler.spoil(refused(503, "SlowDown"), method=method, path="/x")
    bucket.upload(written(tmp_path / "x", b"body"), "x")
    assert bucket.read("x") == b"body"
    assert (meddler.count("PUT"), meddler.count("HEAD"), meddler.count("GET")) == (2, 3, 2)


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


def test_a_store_that_stays_busy_is_a_failing_store(
    store: Store, meddler: Meddler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    meddler.spoil(refused(503, "SlowDown"), times=9)
    with pytest.raises(StoreError, match="the store answers 503 SlowDown to ListObjectsV2"):
        Bucket(store.bucket, "data").listing()
    assert meddler.count("GET") == 2


# --- buckets: uploading ----------------------------------------------------------------------------------------------


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


# --- buckets: downloading --------------------------------------------------------------------------------------------


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


def test_an_etag_that_only_looks_like_an_md5_is_outvoted_by_two_equal_readings(
    store: Store, meddler: Meddler, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = Bucket(store.bucket, "data")
    put_plain(bucket, "x", b"encrypted at rest")
    meddler.forgotten.add("if-match")
    meddler.spoil(header("ETag", f'"{"0a" * 16}"'), method="HEAD")
    stored = bucket.find("x")
    assert stored is not None
    with caplog.at_level(logging.WARNING):
        assert downloaded(bucket, stored) == b"encrypted at rest"
    assert meddler.count("GET", "/x") == 2
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


# --- a real store ----------------------------------------------------------------------------------------------------


@pytest.mark.store
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


@pytest.mark.store
def test_a_real_store_tells_of_a_swapped_object_and_a_missing_bucket(real: Store) -> None:
    real.put("data/x", b"body")
    bucket = Bucket(real.bucket, "data")
    stored = only(bucket)
    real.put("data/x", b"BODY")
    with pytest.raises(StoreError, match="was changed meanwhile"):
        downloaded(bucket, stored)
    with pytest.raises(SettingsError, match="the bucket must exist"):
        Bucket("there-is-no-such-bucket", "").listing()


@pytest.mark.store
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


@pytest.mark.store
def test_a_real_store_whose_authority_is_unknown_is_a_failing_store(
    real: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "AWS_CA_BUNDLE" not in os.environ or not os.environ["AWS_ENDPOINT_URL"].startswith("https:"):
        pytest.skip("no https with an authority of its own")
    monkeypatch.delenv("AWS_CA_BUNDLE")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
        Bucket(real.bucket, "").listing()
