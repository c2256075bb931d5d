"""Credentials that expire in mid-run: newer ones are picked up; where there are none, one line says so."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest

from crowdlayer.errors import AccessError
from crowdlayer.storage.s3 import Bucket
from crowdlayer.verify import verify
from tests.conftest import Store, without_obstore
from tests.forks import Forks
from tests.gate import Gate, endpoint_of
from tests.servers import Meddler
from tests.test_faults import job, published

SOURCES = ("file", "process", "container", "role")
"""Where newer credentials come from."""
BODY = b"a body" * 1000

Source = Callable[[str], Gate]


@pytest.fixture
def meddler(meddler: Meddler, monkeypatch: pytest.MonkeyPatch) -> Meddler:
    """The proxy; there are no credentials yet."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    return meddler


@pytest.fixture
def source(meddler: Meddler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Source]:
    """Puts a gate before the store, whose keys are to be had there, and always the keys of now."""
    with ExitStack() as stack:

        def gate(name: str) -> Gate:
            path = tmp_path / "credentials"
            match name:
                case "file":
                    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
                    made = Gate(lambda keys: replace(path, keys.as_file()))
                case "process":
                    config = tmp_path / "config"
                    config.write_text(f"[default]\ncredential_process = cat {path}\n")
                    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
                    made = Gate(lambda keys: replace(path, keys.as_process()))
                case "container":
                    made = Gate()
                    monkeypatch.setenv(
                        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
                        stack.enter_context(endpoint_of(lambda: made.keys.as_endpoint())),
                    )
                case "role":
                    path.write_text("a token of the platform")
                    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trainer")
                    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(path))
                    made = Gate()
                case _:
                    made = Gate()
                    monkeypatch.setenv("AWS_ACCESS_KEY_ID", made.keys.access)
                    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", made.keys.secret)
                    monkeypatch.setenv("AWS_SESSION_TOKEN", made.keys.token)
            meddler.faults = made
            return made

        yield gate


def replace(path: Path, text: str) -> None:
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.replace(path)


OPERATIONS: dict[str, Callable[[Bucket, Path], object]] = {
    "list": lambda bucket, _: [stored.name for stored in bucket.listing()],
    "find": lambda bucket, _: bucket.find("x") is not None,
    "read": lambda bucket, _: bucket.read("x"),
    "upload": lambda bucket, file: bucket.upload(file, "y"),
    "delete": lambda bucket, _: bucket.delete("z"),
}


@pytest.mark.parametrize(
    ("name", "operation", "reader"),
    [
        pytest.param(
            name, operation, reader,
            marks=() if reader == "obstore" and (name == "file" or operation == "read") else pytest.mark.slow,
        )
        for name in SOURCES
        for operation in OPERATIONS
        for reader in ("botocore", "obstore")
    ],
)  # fmt: skip
def test_a_request_that_finds_the_credentials_expired_is_made_with_newer_ones(
    name: str,
    operation: str,
    reader: str,
    source: Source,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if reader == "botocore":
        without_obstore(monkeypatch)
    store.put("data/x", BODY)
    (tmp_path / "file").write_bytes(BODY)
    gate = source(name)
    bucket = Bucket(store.bucket, "data")
    act = OPERATIONS[operation]
    expected = act(bucket, tmp_path / "file")
    for _ in range(2):
        gate.expire()
        assert act(bucket, tmp_path / "file") == expected
    assert gate.done["ExpiredToken"] >= 2
    assert gate.done.keys() <= {"expired", "ExpiredToken", "let through"}


@pytest.mark.parametrize("reader", ["botocore", "obstore"])
def test_what_the_source_says_of_their_end_is_heeded_before_the_store_refuses(
    reader: str, meddler: Meddler, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reader == "botocore":
        without_obstore(monkeypatch)
    store.put("data/x", BODY)
    meddler.faults = gate = Gate()
    with endpoint_of(lambda: gate.keys.as_endpoint(timedelta(minutes=9))) as url:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
        bucket = Bucket(store.bucket, "data")
        for _ in range(3):
            gate.expire()
            assert bucket.read("x") == BODY
    assert gate.done["ExpiredToken"] <= (2 if reader == "obstore" else 0)  # which keeps them for some seconds


@pytest.mark.parametrize("operation", OPERATIONS)
def test_where_there_are_no_newer_ones_access_is_refused_and_the_reason_said(
    operation: str, source: Source, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_obstore(monkeypatch)
    store.put("data/x", BODY)
    (tmp_path / "file").write_bytes(BODY)
    gate = source("variables")
    bucket = Bucket(store.bucket, "data")
    gate.expire()
    with pytest.raises(AccessError) as caught:
        OPERATIONS[operation](bucket, tmp_path / "file")
    reason = r"the credentials (may )?have expired, and there are no newer ones: variables are not renewed .*"
    said = r"the store must allow this, it answers 400( ExpiredToken)?"
    assert re.fullmatch(rf"s3://{store.bucket}/data(/[xyz])?: {said}; {reason}", str(caught.value))
    assert 2 <= gate.done["ExpiredToken"] <= 8  # at a HEAD's refusal botocore asks for the bucket's region


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
def test_a_line_break_in_the_credentials_is_said_and_nothing_of_them_is_shown(
    name: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of `echo` into a Kubernetes secret, or of a token pasted in several lines."""
    monkeypatch.setenv(name, "aSecret\nof two lines")
    with pytest.raises(AccessError, match="must be one line of printable text, one is not") as caught:
        Bucket(store.bucket, "data").listing()
    assert "aSecret" not in str(caught.value)


@pytest.mark.parametrize(
    ("process", "reason"),
    [
        ("/nowhere/keys --password s3cr3t", "No such file or directory: '/nowhere/keys'"),
        ("/etc", "Permission denied: '/etc'"),
        ("echo no JSON", "it must print JSON as AWS describes it, does not: Expecting value"),
        ("echo []", "it must print JSON as AWS describes it, does not: 'list' object"),
        ("echo 'one quote", "it must print JSON as AWS describes it, does not: No closing quotation"),
    ],
)
def test_a_process_that_gives_no_credentials_is_named_and_access_refused(
    process: str, reason: str, meddler: Meddler, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {process}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    bucket = Bucket(store.bucket, "data")
    for _ in range(2):  # whoever tidies up after the first asks again
        with pytest.raises(AccessError, match=r"credentials are needed: .* from credential_process: ") as caught:
            bucket.find("x")
        assert reason in str(caught.value)
        assert "s3cr3t" not in str(caught.value)


def test_a_process_that_is_gone_when_newer_credentials_are_needed_is_named(
    source: Source, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_obstore(monkeypatch)
    gate = source("process")
    (process := tmp_path / "keys").symlink_to("/bin/cat")
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {process} {tmp_path}/credentials\n")
    bucket = Bucket(store.bucket, "data")
    assert bucket.listing() == []
    process.unlink()
    gate.expire()
    with pytest.raises(AccessError, match=rf"from credential_process: .*'{process}'"):
        bucket.listing()


def test_a_source_that_gives_what_has_expired_is_refused_access(
    meddler: Meddler, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    meddler.faults = gate = Gate()
    good_for = timedelta(minutes=9)
    with endpoint_of(lambda: gate.keys.as_endpoint(good_for)) as url:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", url)
        bucket = Bucket(store.bucket, "data")
        assert bucket.listing() == []
        good_for = timedelta(minutes=-1)
        with pytest.raises(AccessError, match=r"credentials are needed: .*the refreshed credentials are still expired"):
            bucket.find("x")


@pytest.mark.parametrize("name", [SOURCES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SOURCES[1:])])
def test_a_job_whose_credentials_expire_again_and_again_has_the_results_of_one_whose_do_not(
    name: str, source: Source, shapes: Path, store: Store, meddler: Meddler, forks: Forks
) -> None:
    tasks, out = store.put_tree(shapes), f"s3://{store.bucket}"
    gate = source(name)
    assert job(forks, TASKS=tasks, OUTPUT=f"{out}/calm").code == 0
    calm = published(store, "calm/")
    moments = (("GET", "train/"), ("PUT", "checkpoints/"), ("HEAD", "best_models/"), ("PUT", "results/crowdlayer.json"))
    for moment in moments:
        gate.expire_at(*moment)
    done = job(forks, TASKS=tasks, OUTPUT=f"{out}/expiring")
    assert done.code == 0, done.stderr
    assert gate.done["expired"] == len(moments)
    assert gate.done["ExpiredToken"] >= len(moments)
    assert published(store, "expiring/") == calm


def test_a_job_whose_credentials_end_for_good_says_so_and_keeps_all_here(
    source: Source, shapes: Path, store: Store, forks: Forks, tmp_path: Path
) -> None:
    gate = source("variables")
    gate.expire_at("PUT", "best_models/")
    work = tmp_path / "work"
    done = job(forks, TASKS=store.put_tree(shapes), OUTPUT=f"s3://{store.bucket}/out", WORKDIR=str(work))
    assert done.code == 77, done.stderr
    assert (
        "best_models/crowdlayer.pth: the store must allow this, it answers 400 ExpiredToken; the credentials have "
        in (done.last_line)
    )
    assert "is kept in " in done.stderr
    (kept,) = work.glob("crowdlayer-kept-*")
    assert verify(str(kept / "results")) > 2
    assert "out/results/crowdlayer.json" not in store.keys()
