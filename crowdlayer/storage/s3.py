"""Buckets of S3-compatible stores. The only module that imports boto3.

What was measured on Ceph, Swift and moto decides the details.
"""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import boto3
import botocore.session
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import BotoCoreError, ClientError

from ..errors import DataError, SettingsError, StoreError, one_line

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
from .etags import PART, expected_etag
from .fast import FastReader, fast_reader
from .files import CHUNK, Stored, disk_errors, file_digest, may_be_open
from .s3_errors import status_of, translated
from .s3_session import Credentials, client_config, mistrust, new_session
from .s3_stream import ObjectStream

log = logging.getLogger(__name__)
T = TypeVar("T")

THREADS = 64
"""Requests at once: small objects wait for latency, not for bandwidth; botocore's with more wait for Python's lock."""
FAST_THREADS = 128
"""The same for obstore, which does without that lock."""

BARREN = 1000
"""Pages of a listing without anything new, one after the other: a million deleted versions may fill so many."""


@dataclass
class Patience:
    """How long a store may take, and how often it is asked: the setting's, for the whole process."""

    timeout: float = 60
    """Seconds without a byte."""
    attempts: int = 8
    """How often a request, or the reading of an object, is tried; the waits between grow to 20 s, with jitter."""


patience = Patience()


class Bucket:
    """A prefix of an S3-compatible bucket; endpoint, region and credentials as botocore finds them."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.location = f"s3://{bucket}/{prefix}".rstrip("/")
        self._said = False

    @cached_property
    def _session(self) -> botocore.session.Session:
        return new_session(self.location)

    @cached_property
    def _boto3(self) -> boto3.Session:
        """Made once for the session, though a client be asked for again: a second one could not add its methods."""
        return boto3.Session(botocore_session=self._session)

    @cached_property
    def client(self) -> S3Client:
        """Made at the first request; safe to share between threads."""
        with translated(self.location, self.bucket, SettingsError):
            config = client_config(self._session, patience.timeout, patience.attempts, FAST_THREADS)
            client = self._boto3.client("s3", config=config)
            client.meta.events.register_first("needs-retry.s3", mistrust)
            if isinstance(credentials := self._session.get_credentials(), Credentials):
                credentials.watch(client)
            return client

    @cached_property
    def _fast(self) -> FastReader | None:
        """obstore for the same bucket, reached as botocore reaches it; None where it is not installed."""
        client, credentials = self.client, self._session.get_credentials()
        if credentials is None:
            return None

        def presigned() -> str:
            return client.generate_presigned_url("get_object", Params={"Bucket": self.bucket, "Key": "x"})

        def keys() -> tuple[str, str, str | None]:
            access_key, secret_key, token, *_ = credentials.get_frozen_credentials()
            return str(access_key), str(secret_key), token

        bundle = self._session.get_config_variable("ca_bundle")
        return fast_reader(self.bucket, self.location, presigned, keys, bundle, patience.timeout)

    @property
    def threads(self) -> int:
        """Downloads at once that pay, and may be: each has a file and a connection open, of either client."""
        pay = THREADS if self._fast is None else FAST_THREADS
        return max(1, min(pay, may_be_open() // 3))

    def listing(self) -> list[Stored]:
        """All objects below the prefix; markers of folders left out.

        Raises:
            SettingsError: no such bucket.
        """
        found = None if self._fast is None else self._fast.listing(self.prefix)
        return self._listing(self.prefix) if found is None else [self._relative(stored) for stored in found]

    def below(self, folder: str) -> list[Stored]:
        """The objects below a folder of the prefix."""
        return self._listing(f"{self.prefix}{folder}/")

    def _listing(self, prefix: str) -> list[Stored]:
        with translated(self.location, self.bucket):
            found: dict[str, Stored] = {}
            barren, cut = 0, False
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                before = len(found)
                for item in page.get("Contents", []):
                    found[item["Key"]] = Stored(item["Key"], item["Size"], item["ETag"])
                barren, cut = 0 if len(found) > before else barren + 1, page.get("IsTruncated", False)
                if barren > BARREN:
                    raise StoreError(f"{self.location}: its listing must end, {barren} pages in a row had nothing new")
            if cut:
                raise StoreError(f"{self.location}: its listing must be whole, the store ends it after {len(found)}")
            return [self._relative(stored) for key, stored in found.items() if not key.endswith("/")]

    def _relative(self, stored: Stored) -> Stored:
        """Named from the prefix on, not by the whole key."""
        return replace(stored, name=stored.name.removeprefix(self.prefix))

    def find(self, name: str) -> Stored | None:
        with translated(f"{self.location}/{name}", self.bucket):
            try:
                head = self.client.head_object(Bucket=self.bucket, Key=self.prefix + name)
            except ClientError as error:
                if status_of(error) == 404:
                    return None
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
        """Read the version that was listed, and no other, into `file`; returns the SHA-256."""
        if self._fast is not None and (body := self._fast.body(self.prefix + stored.name, stored)) is not None:
            file.write(body)
            return hashlib.sha256(body).hexdigest()

        def copy(stream: io.BufferedReader) -> None:
            if file.tell():  # an earlier reading's
                file.seek(0)
                file.truncate()
            shutil.copyfileobj(stream, file, CHUNK)

        return self._proven(stored, copy)[1]

    def consume(self, stored: Stored, use: Callable[[io.BufferedReader], T]) -> T:
        """What `use` makes of the bytes of the version that was listed, and no other, as they come.

        It counts when they are proven; `use` is called again, with all of them, where they are not. So is its
        DataError: what came may have been the fault.
        """
        return self._proven(stored, use)[0]

    def _proven(self, stored: Stored, use: Callable[[io.BufferedReader], T]) -> tuple[T, str]:
        """What `use` makes of the bytes, and their SHA-256.

        The size is compared always, the store's checksum where it gives one, the MD5 or the parts' MD5s where the ETag
        is made of them. An ETag that only looks like that (encrypted objects, parts of an unknown size) is outvoted by
        two readings that agree.
        """
        thing = one_line(f"{self.location}/{stored.name}")
        suspects: set[str] = set()
        for _ in range(max(2, patience.attempts)):
            stream = self._stream(stored, thing)
            unusable: DataError | None = None
            try:
                made = use(io.BufferedReader(stream, min(CHUNK, stored.size + 1)))
            except DataError as error:
                unusable = error
            sha256 = stream.sha256()
            fits = stream.fits()
            if fits is None:
                self._unverifiable(thing)
            if fits is not False or (sha256 in suspects and stream.fault is None):
                if unusable is not None:
                    raise unusable
                return made, sha256
            suspects.add(sha256)
            log.warning("%s: %s; reading it again", thing, stream.fault or "its MD5 is not its ETag")
        raise StoreError(
            f"{thing}: {stream.fault or 'must read the same twice where its MD5 is not its ETag, does not'}"
        )

    def _stream(self, stored: Stored, thing: str) -> ObjectStream:
        """The object from its first byte on."""
        which: dict[str, Any] = {"Bucket": self.bucket, "Key": self.prefix + stored.name, "IfMatch": stored.etag}

        def get(offset: int) -> dict[str, Any]:
            request: dict[str, Any] = {"Range": f"bytes={offset}-"} if offset else {"ChecksumMode": "ENABLED"}
            return dict(self.client.get_object(**which, **request))

        first_part = None
        if "-" in stored.etag:
            try:
                head = self.client.head_object(**which, PartNumber=1)
                first_part = head["ContentLength"] if head.get("PartsCount") else None
            except (BotoCoreError, ClientError):
                pass  # not every store knows parts
        return ObjectStream(get, stored, thing, self.bucket, patience.attempts, first_part)

    def _unverifiable(self, thing: str) -> None:
        if not self._said:
            log.warning("%s: the store gives no digest of it and its like: only their sizes are compared", thing)
        self._said = True

    def upload(self, source: Path, name: str) -> None:
        """Put an object and compare it with the source.

        A put, and the end of a multi-part upload, replace the object at once or not at all.
        """
        thing = f"{self.location}/{name}"
        with disk_errors(str(source)), translated(thing, self.bucket):  # some of botocore's errors are the system's too
            transfer = TransferConfig(
                multipart_threshold=PART,
                multipart_chunksize=PART,
                max_concurrency=8,
                preferred_transfer_client="classic",  # the other one drops the endpoint
            )
            with source.open("rb") as file:
                self.client.upload_fileobj(file, self.bucket, self.prefix + name, Config=transfer)
        self.compare(source, name)

    def compare(self, source: Path, name: str) -> None:
        """Compare an object with what it was made of: by its ETag where that is an MD5, else by reading it back."""
        thing = f"{self.location}/{name}"
        with disk_errors(str(source)), translated(thing, self.bucket):
            stored = self.find(name)
            if stored is None or stored.size != source.stat().st_size:
                raise StoreError(f"{thing}: must be there as uploaded, is {stored}")
            if stored.etag.strip('"') != expected_etag(source):
                with tempfile.TemporaryFile() as file:
                    if self.download(stored, file) != file_digest(source):
                        raise StoreError(f"{thing}: what was uploaded must read back the same, it does not")

    def delete(self, name: str) -> None:
        with translated(f"{self.location}/{name}", self.bucket):
            self.client.delete_object(Bucket=self.bucket, Key=self.prefix + name)

    def prune(self, folder: str) -> None:
        """A bucket has no folders to be empty."""
