"""Single files and objects, as the tests of storage put and read them."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from crowdlayer.storage.files import Stored
from crowdlayer.storage.s3 import Bucket


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
