"""The bytes of one object of a bucket, as they come: a body that broke goes on from there."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Any

import tenacity
from botocore.exceptions import ClientError, FlexibleChecksumError, HTTPClientError, IncompleteReadError
from botocore.exceptions import ConnectionError as NoConnectionError
from botocore.httpchecksum import StreamingChecksumBody
from urllib3.exceptions import HTTPError  # botocore lets some of these through from the middle of a body

from ..errors import StoreError, one_line
from .etags import EtagCheck
from .files import Stored
from .s3_errors import status_of, translated

LITTLE = 2**16
"""Bytes of a buffer that is made for every object, most of which are small."""


class ObjectStream(io.RawIOBase):
    """The version of an object that was listed, read once from its start to its end.

    Args:
        get: asks for the object from an offset on: botocore's answer to GetObject.
        attempts: how often a request, or a piece of the body, is tried.
        first_part: bytes of the object's first part, where it was put in parts and the store tells it.

    Raises, when read:
        StoreError: it broke off too often, or is not there as it was listed; and what else `translated` says.
    """

    def __init__(
        self,
        get: Callable[[int], dict[str, Any]],
        stored: Stored,
        thing: str,
        bucket: str,
        attempts: int,
        first_part: int | None,
    ) -> None:
        self._get = get
        self._stored = stored
        self._thing = thing
        self._bucket = bucket
        self._attempts = attempts
        self._position = 0
        self._body: Any = None
        self._ended = False
        self._sha256 = hashlib.sha256()
        self._etag = EtagCheck(stored, first_part)
        self._checked = False
        """Whether the store gives a checksum of its own that botocore compares: of all, and of a kind it knows."""
        self.fault: str | None = None
        """What is wrong with what came, as far as no second reading could make it right."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._ended:
            return 0
        with translated(self._thing, self._bucket):
            chunk = self._patiently(len(buffer))
        buffer[: len(chunk)] = chunk
        self._position += len(chunk)
        self._sha256.update(chunk)
        self._etag.update(chunk)
        return len(chunk)

    def sha256(self) -> str:
        """Of all, hexadecimal; what nobody has read yet is read."""
        rest = bytearray(LITTLE)
        while self.readinto(rest):
            pass
        return self._sha256.hexdigest()

    def fits(self) -> bool | None:
        """Whether the whole is what was listed; None where the store gives no digest to tell it by."""
        return self.fault is None and (self._checked or self._etag.fits())

    def _next(self, n: int) -> bytes:
        """At most `n` bytes more; none at the end."""
        try:
            if self._body is None:
                if self._position and self._position == self._stored.size:  # it broke after the last byte
                    self._ended = True
                    return b""
                answer = self._get(self._position)
                self._body = answer["Body"]
                self._checked = not self._position and isinstance(self._body, StreamingChecksumBody)
            chunk: bytes = self._body.read(n)
        except FlexibleChecksumError as error:
            self.fault, self._ended = one_line(str(error)), True
            return b""
        except ClientError as error:
            if status_of(error) < 500:
                raise
            raise StoreError(f"{self._thing}: the store answers {status_of(error)} to GetObject") from error
        except (HTTPClientError, NoConnectionError, IncompleteReadError, HTTPError) as error:
            self._body, self._checked = None, False
            raise StoreError(f"{self._thing}: the connection must last, it broke: {one_line(str(error))}") from error
        came = self._position + len(chunk)
        wrong = f"must have the listed {self._stored.size} bytes, {came} came"
        if came > self._stored.size:
            self.fault, self._ended = wrong, True
            return b""
        if not chunk:
            if came < self._stored.size:
                self._body, self._checked = None, False
                raise StoreError(f"{self._thing}: {wrong}")
            self._ended = True
        return chunk

    def _patiently(self, n: int) -> bytes:
        """At most `n` bytes more, asked for again where a body breaks: botocore retries requests only.

        And where a request fails: its quota of retries is one for all threads, and spent after seconds of a store that
        is away. Half of each wait is chance, not the whole: of many objects one would give up early.
        """
        try:
            return self._next(n)
        except StoreError as error:
            failures = [error]  # tenacity's first attempt: it costs a tenth of a small object, which seldom needs it

        def attempt() -> bytes:
            if failures:
                raise failures.pop()
            return self._next(n)

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(StoreError),
            wait=tenacity.wait_exponential(0.5, max=10) + tenacity.wait_random_exponential(0.5, max=10),
            stop=tenacity.stop_after_attempt(self._attempts),
            reraise=True,
        )(attempt)
