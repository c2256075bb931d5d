"""Buckets of S3-compatible stores. The only module that imports boto3.

What was measured on Ceph, Swift and moto decides the details: botocore's default checksums make every upload over
https fail on the first two, and error messages may be missing, so nothing here branches on a message.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import boto3
import botocore.loaders
import botocore.session
import tenacity
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as NoConnectionError
from urllib3.exceptions import HTTPError  # botocore lets some of these through from the middle of a body

from .errors import AccessError, CrowdlayerError, SettingsError, StoreError, one_line

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
from .files import CHUNK, Stored, disk_errors, file_digest

log = logging.getLogger(__name__)

THREADS = 32
"""Requests at once: small objects wait for latency, not for bandwidth."""
PART = 64 * 2**20
"""Bytes per part of an upload; a constant, so that the ETag of a multi-part upload can be foretold."""
ATTEMPTS = 8
"""How often a request, or the reading of an object, is tried; the waits between grow to 20 s, with jitter."""


class Bucket:
    """A prefix of an S3-compatible bucket; endpoint, region and credentials as botocore finds them."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.location = f"s3://{bucket}/{prefix}".rstrip("/")

    @cached_property
    def client(self) -> S3Client:
        """Made at the first request; safe to share between threads."""
        with self._translated(self.location, SettingsError):
            session = botocore.session.get_session()
            session.register_component("data_loader", _data_loader())
            said = session.get_scoped_config()

            def unless_said(option: str, value: str) -> str | None:
                return None if option in said or f"AWS_{option.upper()}" in os.environ else value

            attempts = None if "AWS_MAX_ATTEMPTS" in os.environ or "max_attempts" in said else ATTEMPTS
            mode = unless_said("retry_mode", "standard")
            retries: dict[str, Any] = {} if mode is None else {"mode": mode}
            if attempts is not None:
                retries["total_max_attempts"] = attempts
            config = Config(
                signature_version="s3v4",
                max_pool_connections=THREADS,
                connect_timeout=10,
                read_timeout=60,
                retries=retries or None,  # type: ignore[arg-type]
                request_checksum_calculation=unless_said("request_checksum_calculation", "when_required"),  # type: ignore[arg-type]
                response_checksum_validation=unless_said("response_checksum_validation", "when_required"),  # type: ignore[arg-type]
                user_agent_extra="crowdlayer",
            )
            # botocore does not know AWS_REGION, which the platforms set; most other stores take us-east-1
            region = os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
            session.set_config_variable("region", region)
            bundle = session.get_config_variable("ca_bundle")
            if bundle and not Path(bundle).exists():
                raise SettingsError(f"{self.location}: AWS_CA_BUNDLE must be a file, there is none at {bundle}")
            if (credentials := session.get_credentials()) is not None:
                try:
                    credentials.get_frozen_credentials()  # a role's token is read here at the latest
                except (FileNotFoundError, PermissionError) as error:
                    raise AccessError(f"{self.location}: credentials are needed: {one_line(str(error))}") from error
            return boto3.Session(botocore_session=session).client("s3", config=config)

    def listing(self) -> list[Stored]:
        """All objects below the prefix; markers of folders left out.

        Raises:
            SettingsError: no such bucket.
        """
        with self._translated(self.location):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
            return [
                Stored(item["Key"].removeprefix(self.prefix), item["Size"], item["ETag"])
                for page in pages
                for item in page.get("Contents", [])
                if not item["Key"].endswith("/")
            ]

    def find(self, name: str) -> Stored | None:
        try:
            head = self.client.head_object(Bucket=self.bucket, Key=self.prefix + name)
        except ClientError as error:
            if _status(error) == 404:
                return None
            with self._translated(f"{self.location}/{name}"):
                raise
        except BotoCoreError:
            with self._translated(f"{self.location}/{name}"):
                raise
        return Stored(name, head["ContentLength"], head["ETag"])

    def read(self, name: str) -> bytes | None:
        stored = self.find(name)
        if stored is None:
            return None
        file = io.BytesIO()
        self.download(stored, file)
        return file.getvalue()

    def download(self, stored: Stored, file: IO[bytes]) -> str:
        """Read the version that was listed, and no other, into `file`; returns the SHA-256.

        The size is compared always, the store's checksum where it gives one, the MD5 where the ETag is one. An ETag
        that only looks like an MD5 (encrypted objects) is outvoted by two readings that agree.
        """
        thing = one_line(f"{self.location}/{stored.name}")
        suspect: str | None = None
        with self._translated(thing):
            for attempt in _retrying():
                with attempt:
                    for _ in range(2):
                        sha256, md5 = self._read_whole(stored, file, thing)
                        if not _is_md5(stored.etag) or stored.etag.strip('"') == md5 or sha256 == suspect:
                            return sha256
                        suspect = sha256
                        _empty(file)
                        log.warning("%s: its MD5 is not its ETag; reading it again", thing)
                    raise StoreError(f"{thing}: must read the same twice where its MD5 is not its ETag, does not")
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _read_whole(self, stored: Stored, file: IO[bytes], thing: str) -> tuple[str, str]:
        """One pass from where `file` ends; a body that broke goes on from there at the next attempt."""
        offset = file.seek(0, os.SEEK_END)
        request: dict[str, Any] = {"Range": f"bytes={offset}-"} if offset else {"ChecksumMode": "ENABLED"}
        if offset < stored.size or not offset:
            answer = self.client.get_object(
                Bucket=self.bucket, Key=self.prefix + stored.name, IfMatch=stored.etag, **request
            )
            try:
                for chunk in answer["Body"].iter_chunks(CHUNK):
                    file.write(chunk)
            except FlexibleChecksumError as error:
                _empty(file)
                raise StoreError(f"{thing}: {one_line(str(error))}") from error
            except (HTTPClientError, IncompleteReadError, HTTPError) as error:
                raise StoreError(f"{thing}: the connection must last, it broke: {one_line(str(error))}") from error
        if (size := file.tell()) != stored.size:
            _empty(file)
            raise StoreError(f"{thing}: must have the listed {stored.size} bytes, {size} came")
        file.seek(0)
        sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            md5.update(chunk)
        return sha256.hexdigest(), md5.hexdigest()

    def upload(self, source: Path, name: str) -> None:
        """Put an object and compare it with the source: by its ETag where that is an MD5, else by reading it back.

        A put, and the end of a multi-part upload, replace the object at once or not at all.
        """
        thing = f"{self.location}/{name}"
        with disk_errors(str(source)), self._translated(thing):  # some of botocore's errors are the system's too
            transfer = TransferConfig(
                multipart_threshold=PART,
                multipart_chunksize=PART,
                max_concurrency=8,
                preferred_transfer_client="classic",  # the other one drops the endpoint
            )
            with source.open("rb") as file:
                self.client.upload_fileobj(file, self.bucket, self.prefix + name, Config=transfer)
            stored = self.find(name)
            if stored is None or stored.size != source.stat().st_size:
                raise StoreError(f"{thing}: must be there as uploaded, is {stored}")
            if stored.etag.strip('"') != _expected_etag(source):
                with tempfile.TemporaryFile() as file:
                    if self.download(stored, file) != file_digest(source):
                        raise StoreError(f"{thing}: what was uploaded must read back the same, it does not")

    def delete(self, name: str) -> None:
        with self._translated(f"{self.location}/{name}"):
            self.client.delete_object(Bucket=self.bucket, Key=self.prefix + name)

    @contextmanager
    def _translated(self, thing: str, otherwise: type[CrowdlayerError] = StoreError) -> Iterator[None]:
        """Turn botocore's errors into ours, by type, status and code."""
        thing = one_line(thing)
        try:
            yield
        except CrowdlayerError:
            raise
        except ClientError as error:
            code, status = str(error.response.get("Error", {}).get("Code", "")), _status(error)
            if code == "NoSuchBucket":
                raise SettingsError(f"{thing}: the bucket must exist, {self.bucket!r} does not") from error
            if status in (401, 403) or code in ("ExpiredToken", "InvalidToken") or _of_a_role(error):
                raise AccessError(f"{thing}: the store must allow this, it answers {status} {code}") from error
            if status == 412:
                raise StoreError(f"{thing}: must stay as it was listed, was changed meanwhile") from error
            raise StoreError(f"{thing}: the store answers {status} {code} to {error.operation_name}") from error
        except (
            NoCredentialsError,
            PartialCredentialsError,
            CredentialRetrievalError,
            TokenRetrievalError,
            SSOError,
        ) as error:
            raise AccessError(f"{thing}: credentials are needed: {one_line(str(error))}") from error
        except (ParamValidationError, ValueError) as error:  # ValueError: an endpoint that is no URL
            raise SettingsError(f"{thing}: {one_line(str(error))}") from error
        except (HTTPClientError, NoConnectionError) as error:
            raise StoreError(f"{thing}: {one_line(str(error))}") from error
        except BotoCoreError as error:
            raise otherwise(f"{thing}: {one_line(str(error))}") from error


@cache
def _data_loader() -> botocore.loaders.Loader:
    """botocore's descriptions of S3, parsed once: nearly all that a further client costs."""
    return botocore.loaders.create_loader()


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _of_a_role(error: ClientError) -> bool:
    """Whether a role was refused: STS answers 400 to a token that is old or not its own."""
    return error.operation_name.startswith("AssumeRole") and 400 <= _status(error) < 500


def _empty(file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()


def _is_md5(etag: str) -> bool:
    """Whether it looks like one: an upload in parts has another, and so do some stores."""
    return re.fullmatch('"?[0-9a-f]{32}"?', etag) is not None


def _retrying() -> tenacity.Retrying:
    """For bodies that break or come out wrong, which botocore does not retry as it does requests."""
    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(StoreError),
        wait=tenacity.wait_random_exponential(max=20),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        reraise=True,
    )


def _expected_etag(source: Path) -> str:
    """S3's ETag of an upload by parts of `PART`: the MD5, or the MD5 of the parts' MD5s and their number."""
    digests = []
    with source.open("rb") as file:
        while part := file.read(PART):
            digests.append(hashlib.md5(part, usedforsecurity=False))
    if source.stat().st_size < PART:
        return digests[0].hexdigest() if digests else hashlib.md5(usedforsecurity=False).hexdigest()
    joined = b"".join(digest.digest() for digest in digests)
    return f"{hashlib.md5(joined, usedforsecurity=False).hexdigest()}-{len(digests)}"
