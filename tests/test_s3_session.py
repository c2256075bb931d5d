"""How a bucket is reached: checksums, signatures, retries, region, address and authority, as AWS's variables say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from botocore.utils import parse_timestamp

from crowdlayer.storage import s3_session
from crowdlayer.storage.s3 import Bucket
from tests.conftest import BOTH, Store
from tests.objects import written
from tests.servers import Meddler, certificate, meddling, refused

pytestmark = pytest.mark.usefixtures("reader")


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


def test_a_store_that_is_busy_is_asked_again(store: Store, meddler: Meddler, tmp_path: Path) -> None:
    bucket = Bucket(store.bucket, "data")
    for method in ("PUT", "HEAD", "GET"):
        meddler.spoil(refused(503, "SlowDown"), method=method, path="/x")
    bucket.upload(written(tmp_path / "x", b"body"), "x")
    assert bucket.read("x") == b"body"
    assert (meddler.count("PUT"), meddler.count("HEAD"), meddler.count("GET")) == (2, 3, 2)


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


@pytest.mark.parametrize(
    "value",
    ["Tue, 24 Nov 2026 03:54:10 GMT", "2026-11-24T03:54:10.120Z", "Tue, 24 Nov 2026 03:54:10 +0200", "1795492450"],
)
def test_a_time_is_read_as_botocore_reads_it(value: str) -> None:
    assert s3_session._timestamp(value) == parse_timestamp(value)
