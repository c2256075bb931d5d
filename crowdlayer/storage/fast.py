"""Listings and small objects by obstore, where it is installed: a third of botocore's CPU time. Its only importer.

What obstore gives is proven or not used. Whatever goes wrong, botocore asks for the same, with its patience, its checks
and its errors; so nothing here raises, retries or translates.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from ..errors import one_line
from .etags import ETAG, md5
from .files import Stored

if TYPE_CHECKING:
    from obstore.store import S3Credential, S3Store

log = logging.getLogger(__name__)

SMALL = 2**20
"""Bytes of the largest object that is read by obstore, whole into the memory; larger ones wait for bandwidth."""
PAGE = 100
"""Keys of which a full page of a listing has a multiple."""
TRIES = 3
"""After so many failures and no success obstore is not asked again."""
FRESH = timedelta(minutes=5, seconds=15)
"""For how long credentials are said to be good: obstore asks for them again when five minutes are left."""


class FastReader:
    """One bucket, read by obstore. Objects by their whole key; None is "ask botocore"."""

    def __init__(self, store: S3Store, location: str, timeout: float) -> None:
        """`timeout`: seconds for a page of a listing."""
        self._store: S3Store | None = store
        self._location = location
        self._timeout = timeout
        self._works = False
        self._failures = 0

    def listing(self, prefix: str) -> list[Stored] | None:
        """The objects below a prefix, which ends in a slash, by their whole keys.

        obstore takes slashes from the ends of a key. So a marker of a folder looks like an empty file, and a listing
        with one of these is not used; nor that of a whole bucket, where a key may begin with a slash; nor one that a
        store may have cut without a word after some full pages, or before the first: a store may not know this way of
        listing.
        """
        if self._store is None or not prefix:
            return None
        thread = ThreadPoolExecutor(1)  # obstore hears no signal, and whoever calls may have an event loop of his own
        try:
            found = thread.submit(asyncio.run, _listed(self._store, prefix, self._timeout)).result()
        except Exception as error:
            self._failed(f"a listing of {prefix}", error)
            return None
        finally:
            thread.shutdown(wait=False)
        whole = len(found) % PAGE != 0 and all(stored.size and stored.etag for stored in found)
        return found if whole else None

    def body(self, key: str, stored: Stored) -> bytes | None:
        """The bytes of the object, whose size and MD5 are those that were listed."""
        form = ETAG.fullmatch(stored.etag)
        if self._store is None or stored.size > SMALL or form is None or form["parts"] is not None:
            return None
        import obstore

        try:
            body = obstore.get(self._store, key, options={"if_match": stored.etag}).bytes().to_bytes()
        except Exception as error:
            self._failed(key, error)
            return None
        digest = md5()
        digest.update(body)
        if len(body) != stored.size or digest.hexdigest() != form["md5"]:
            self._failed(key, "its size and MD5 are not those that were listed")
            return None
        self._works = True
        return body

    def _failed(self, what: str, reason: object) -> None:
        why = one_line(str(reason)) or type(reason).__name__
        log.debug("%s: obstore cannot read %s: %s", self._location, one_line(what), why)
        self._failures += 1
        if not self._works and self._failures >= TRIES and self._store is not None:
            self._store = None
            log.warning("%s: read by botocore alone, obstore cannot: %s", self._location, why)


async def _listed(store: S3Store, prefix: str, timeout: float) -> list[Stored]:
    """All of it, or an error: pages that bring nothing new go on for ever, and so do empty ones, inside obstore."""
    import obstore

    found: dict[str, Stored] = {}
    pages = aiter(obstore.list(store, prefix, chunk_size=1000))
    while True:
        try:
            page = await asyncio.wait_for(anext(pages), timeout)
        except StopAsyncIteration:
            return list(found.values())
        before = len(found)
        for item in page:
            found[item["path"]] = Stored(item["path"], item["size"], item["e_tag"] or "")
        if len(found) == before:
            raise ValueError("a page has nothing new")


def fast_reader(
    bucket: str,
    location: str,
    presigned: Callable[[], str],
    keys: Callable[[], tuple[str, str, str | None]],
    bundle: str | None,
    timeout: float,
) -> FastReader | None:
    """obstore for the bucket as botocore reaches it; None where it is not installed or does not take what it is told.

    Args:
        presigned: a URL of the object `x` made by botocore, which tells endpoint, addressing and region.
        keys: botocore's credentials now: access key, secret key, session token.
        bundle: a file of authorities to trust.
        timeout: seconds without a byte.
    """
    try:
        from obstore.store import S3Store
    except ImportError:
        return None

    def provide() -> S3Credential:
        access_key, secret_key, token = keys()
        return {
            "access_key_id": access_key,
            "secret_access_key": secret_key,
            "token": token,
            "expires_at": datetime.now(UTC) + FRESH,
        }

    try:
        url = urlsplit(presigned())
        region = parse_qs(url.query)["X-Amz-Credential"][0].split("/")[2]
        options: dict[str, Any] = {
            "allow_http": url.scheme == "http",
            "connect_timeout": timedelta(seconds=min(10, timeout)),
            "read_timeout": timedelta(seconds=timeout),
            "timeout": timedelta(hours=1),  # of a whole object
            "user_agent": "crowdlayer",
        }
        if bundle:
            options["root_certificate"] = Path(bundle).read_bytes()
        store = S3Store(
            bucket,
            config={
                "aws_endpoint_url_s3": f"{url.scheme}://{url.netloc}{url.path.removesuffix('/x')}",
                "virtual_hosted_style_request": True,  # the bucket is in the URL already, wherever botocore puts it
                "region": region,
            },
            client_options=options,  # type: ignore[arg-type]
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=timeout)},
            credential_provider=provide,
        )
    except Exception as error:
        log.warning("%s: read by botocore alone, obstore cannot: %s", location, one_line(str(error)))
        return None
    return FastReader(store, location, timeout)
