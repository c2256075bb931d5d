"""Whatever keeps a bucket from being used is named, with the exit code that tells whether a retry helps."""

from __future__ import annotations

import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path

import pytest

from crowdlayer.errors import AccessError, SettingsError, StoreError
from crowdlayer.storage.s3 import Bucket
from tests.conftest import BOTH, Store
from tests.objects import downloaded, only, written
from tests.servers import Answer, Meddler, certificate, free_port, header, meddling, refused

pytestmark = pytest.mark.usefixtures("reader")


# --- it is the settings ----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL", "no url"),
        ("AWS_ENDPOINT_URL", "127.0.0.1:9000"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9000 "),
        ("AWS_ENDPOINT_URL", "http://minio:$(MINIO_PORT)"),
        ("AWS_ENDPOINT_URL", "http://minio:tcp://10.0.0.1:9000"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:port"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:99999"),
        ("AWS_ENDPOINT_URL", "s3://127.0.0.1:9000"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9000/x?y"),
        ("AWS_CA_BUNDLE", "/nowhere/ca.crt"),
        ("AWS_CA_BUNDLE", "/etc"),
        ("AWS_CA_BUNDLE", __file__),
        ("AWS_CA_BUNDLE", "/proc/self/mem"),
        ("AWS_PROFILE", "nobody"),
        ("AWS_REGION", "no region!"),
        ("AWS_MAX_ATTEMPTS", "many"),
        ("AWS_MAX_ATTEMPTS", "0"),
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
    bucket = Bucket(store.bucket, "")
    for _ in range(2):  # whoever tidies up after the first asks again
        with pytest.raises(SettingsError) as raised:
            bucket.listing()
        assert str(raised.value).startswith(f"s3://{store.bucket}: ")
        assert "\n" not in str(raised.value)


def test_a_text_of_awss_that_botocore_cannot_read_is_said_with_where_to_look(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "abc")
    with pytest.raises(SettingsError, match=r"AWS's variables and files must be right, botocore says: .*'abc'$"):
        Bucket(store.bucket, "").listing()


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
def test_an_endpoint_with_the_bucket_in_it_is_a_wrong_setting(
    store: Store, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a store's console shows it, to be copied: the bucket is named twice then, the second time as an object."""
    store.put("data/x", b"x")
    for added in ("", "/"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"{endpoint}/{store.bucket}{added}")
        with pytest.raises(
            SettingsError, match=r"AWS_ENDPOINT_URL must be the store's, without a bucket; it answers 404"
        ):
            Bucket(store.bucket, "data").listing()


# --- it is the rights ------------------------------------------------------------------------------------------------


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
    answer, *clock = said.partition("it answers ")[2].split(";")
    assert answer == ("403 RequestTimeTooSkewed" if method == "GET" else "403")
    assert clock == ([] if told is None else [f" this machine's clock must be right, it is {told} the store's"])


# --- it is the store -------------------------------------------------------------------------------------------------


@BOTH
def test_a_store_that_cannot_be_reached_is_a_failing_store(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match="Could not connect") as raised:
        Bucket(store.bucket, "").listing()
    assert raised.value.exit_code == 74


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


def test_a_store_that_stays_busy_is_a_failing_store(
    store: Store, meddler: Meddler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    meddler.spoil(refused(503, "SlowDown"), times=9)
    with pytest.raises(StoreError, match="the store answers 503 SlowDown to ListObjectsV2"):
        Bucket(store.bucket, "data").listing()
    assert meddler.count("GET") == 2
