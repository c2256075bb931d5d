"""How a bucket is reached: botocore's session, the settings of a client, and credentials that may expire in mid-run."""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any

import botocore.loaders
import botocore.session
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import ReadOnlyCredentials, create_credential_resolver
from botocore.exceptions import BotoCoreError, CredentialRetrievalError
from botocore.utils import parse_timestamp

from ..errors import SettingsError, one_line
from .s3_errors import NO_REASON, OUTDATED

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


def new_session(location: str) -> botocore.session.Session:
    """A session as the environment and AWS's files say.

    Raises:
        SettingsError: naming `location`.
        BotoCoreError: credentials that cannot be had.
    """
    session = botocore.session.get_session()
    session.register_component("data_loader", _data_loader())
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
    # botocore does not know AWS_REGION, which the platforms set; most other stores take us-east-1
    region = os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
    session.set_config_variable("region", region)
    bundle = session.get_config_variable("ca_bundle")
    if bundle:
        try:
            ssl.create_default_context(cafile=bundle)
        except OSError as error:  # ssl's own is one
            rule = "AWS_CA_BUNDLE must be a file of certificates, as PEM"
            raise SettingsError(f"{location}: {rule}; of {bundle} Python says: {one_line(str(error))}") from error
    session.register_component("credential_provider", Credentials(session))
    if (credentials := session.get_credentials()) is not None:
        credentials.get_frozen_credentials()  # a role's token is read here at the latest
    return session


def client_config(session: botocore.session.Session, timeout: float, attempts: int, connections: int) -> Config:
    """How a client makes requests; what the user has said to botocore of checksums and retries goes before.

    Its default checksums make every upload over https fail on Ceph and Swift.

    Args:
        timeout: seconds without a byte.
        attempts: how often a request is tried.
        connections: at once.
    """
    said = session.get_scoped_config()

    def unless_said(option: str, value: str) -> str | None:
        return None if option in said or f"AWS_{option.upper()}" in os.environ else value

    mode = unless_said("retry_mode", "standard")
    retries: dict[str, Any] = {} if mode is None else {"mode": mode}
    if "AWS_MAX_ATTEMPTS" not in os.environ and "max_attempts" not in said:
        retries["total_max_attempts"] = attempts
    return Config(
        signature_version="s3v4",
        max_pool_connections=connections,
        connect_timeout=min(10, timeout),
        read_timeout=timeout,
        retries=retries or None,  # type: ignore[arg-type]
        request_checksum_calculation=unless_said("request_checksum_calculation", "when_required"),  # type: ignore[arg-type]
        response_checksum_validation=unless_said("response_checksum_validation", "when_required"),  # type: ignore[arg-type]
        user_agent_extra="crowdlayer",
    )


def mistrust(response: tuple[Any, dict[str, Any]] | None, operation: Any, **_: object) -> None:
    """Have tried again what botocore takes for an answer.

    That is 429 with a code that it does not know; and a body that ends before its first byte: a listing cut there is
    one of nothing, and images are gone without a word.
    """
    if response is None:
        return
    http, parsed = response
    if http.status_code == 429:
        parsed.setdefault("Error", {})["Code"] = "SlowDown"
    elif not operation.has_streaming_output and operation.http["method"] != "HEAD":
        declared = http.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > len(http.content):
            http.status_code = 503


class Credentials:
    """The credentials that botocore finds, and finds anew when the store says that they have expired.

    botocore renews those whose end it was told, a quarter of an hour before. It does not read a file again that
    somebody else renews, nor believe a store that ends them sooner.
    """

    def __init__(self, session: botocore.session.Session) -> None:
        self._session = session
        self._found: Any = None
        self._since = 0.0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        """As of those that were found last: botocore asks for several."""
        return getattr(self._found, name)

    def load_credentials(self) -> Credentials | None:
        """The session's, as botocore asks for them; None where there are none."""
        self._find()
        return None if self._found is None else self

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """What a request is signed with."""
        try:
            with self._retrieving():
                frozen: ReadOnlyCredentials = self._found.get_frozen_credentials()
        except RuntimeError as error:  # botocore's word for a source that gives what has expired
            raise CredentialRetrievalError(provider=self._found.method, error_msg=str(error)) from error
        if any(part and not part.isprintable() for part in frozen):  # http.client would refuse it, and show it
            said = "a key or token must be one line of printable text, one is not"
            raise CredentialRetrievalError(provider=self._found.method, error_msg=said)
        return frozen

    def watch(self, client: S3Client) -> None:
        """Renew the credentials for the requests of this client."""
        client.meta.events.register_first("before-sign.s3", self._signing)
        client.meta.events.register_first("needs-retry.s3", self._renew)  # type: ignore[arg-type]  # botocore waits as told

    def _signing(self, request: AWSRequest, **_: object) -> None:
        request.context["signed"] = time.monotonic()

    def _renew(
        self, response: tuple[Any, dict[str, Any]] | None, request_dict: dict[str, Any], **_: object
    ) -> int | None:
        """Have a request that was refused for its credentials sent once more, with those that are there now.

        A HEAD is refused without a reason.

        Returns:
            Seconds until then; None where it is not to be sent again.
        """
        context = request_dict["context"]
        if response is None or "renewed" in context:
            return None
        code = response[1].get("Error", {}).get("Code")
        if code not in OUTDATED and code not in NO_REASON:
            return None
        context["renewed"] = True
        with self._lock:
            if self._since <= context["signed"]:  # else another request's refusal was the first
                self._find()
        return 0

    def _find(self) -> None:
        with self._retrieving():
            self._found = create_credential_resolver(self._session).load_credentials() or self._found
        self._since = time.monotonic()

    @contextmanager
    def _retrieving(self) -> Iterator[None]:
        """Make botocore's own error of what it lets through: a process or a token that is not there, no sense in it."""
        try:
            yield
        except BotoCoreError:  # some are OSErrors or ValueErrors too
            raise
        except OSError as error:
            source = "credential_process" if self._has_process() else "a file"
            raise CredentialRetrievalError(provider=source, error_msg=str(error)) from error
        except (ValueError, AttributeError) as error:  # no JSON, or JSON and no object
            if not self._has_process():
                raise
            said = f"it must print JSON as AWS describes it, does not: {error}"
            raise CredentialRetrievalError(provider="credential_process", error_msg=said) from error

    def _has_process(self) -> bool:
        """Whether AWS's files name a credential_process; its command may hold secrets, and is not shown."""
        return "credential_process" in self._session.get_scoped_config()


@cache
def _data_loader() -> botocore.loaders.Loader:
    """botocore's descriptions of S3, parsed once: nearly all that a further client costs."""
    return botocore.loaders.create_loader()


def _timestamp(value: Any) -> datetime:
    """A time as botocore reads it, of a listing or of a header.

    Its own way to do so took two thirds of the time of a listing, and a twentieth of that of a small object.
    """
    if isinstance(value, str) and "T" in value:
        with suppress(ValueError):
            return parsedate_to_datetime(value) if value.endswith(" GMT") else datetime.fromisoformat(value)
    return parse_timestamp(value)
