"""What botocore raises, as errors of ours: by type, status and code: messages may be missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    EndpointProviderError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as NoConnectionError

from ..errors import AccessError, CrowdlayerError, SettingsError, StoreError, one_line
from ..logs import duration

SKEW = 240.0
"""Seconds that clocks may differ: stores take a signature that is five to fifteen minutes old or early for forged."""

OUTDATED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId"}
"""What stores answer to credentials that were good once."""
NO_REASON = {"400", "401", "403"}
"""All that they answer to a HEAD, be it that."""


@contextmanager
def translated(thing: str, bucket: str, otherwise: type[CrowdlayerError] = StoreError) -> Iterator[None]:
    """Turn the errors of a request for `thing` into ours; `otherwise` is what is none of the store's."""
    thing = one_line(thing)
    try:
        yield
    except CrowdlayerError:
        raise
    except ClientError as error:
        code, status = str(error.response.get("Error", {}).get("Code", "")), status_of(error)
        answer = f"{status} {code}" if code != str(status) else code  # a HEAD's has no code of its own
        if code == "NoSuchBucket":
            raise SettingsError(f"{thing}: the bucket must exist, {bucket!r} does not") from error
        if code == "NoSuchKey" and error.operation_name == "ListObjectsV2":  # it was asked for an object
            rule = "AWS_ENDPOINT_URL must be the store's, without a bucket"
            raise SettingsError(f"{thing}: {rule}; it answers {answer} to a listing") from error
        if status in (401, 403) or code in OUTDATED or code in NO_REASON or _of_a_role(error):
            why = _of_the_clock(error) or _of_expiry(code)
            said = f"{thing}: the store must allow this, it answers {answer}{why}"
            raise AccessError(said) from error
        if status == 412:
            raise StoreError(f"{thing}: must stay as it was listed, was changed meanwhile") from error
        raise StoreError(f"{thing}: the store answers {answer} to {error.operation_name}") from error
    except (
        NoCredentialsError,
        PartialCredentialsError,
        CredentialRetrievalError,
        TokenRetrievalError,
        SSOError,
    ) as error:
        raise AccessError(f"{thing}: credentials are needed: {one_line(str(error))}") from error
    except ParamValidationError as error:  # as of a bucket's name
        raise SettingsError(f"{thing}: {one_line(str(error))}") from error
    except (ValueError, EndpointProviderError) as error:  # as of an endpoint that is no URL, a number that is none
        rule = "AWS's variables and files must be right"
        raise SettingsError(f"{thing}: {rule}, botocore says: {one_line(str(error))}") from error
    except (HTTPClientError, NoConnectionError) as error:
        raise StoreError(f"{thing}: {one_line(str(error))}") from error
    except BotoCoreError as error:
        raise otherwise(f"{thing}: {one_line(str(error))}") from error


def status_of(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _of_the_clock(error: ClientError) -> str:
    """That this machine's clock is wrong, where the answer's date says so; of a HEAD's refusal there is no more."""
    date = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        ahead = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()
    except (ValueError, TypeError):  # no date, or one without a time zone
        return ""
    if abs(ahead) < SKEW:
        return ""
    way = "ahead of" if ahead > 0 else "behind"
    return f"; this machine's clock must be right, it is {duration(abs(ahead))} {way} the store's"


def _of_expiry(code: str) -> str:
    """That credentials may be too old. They were looked for again before this is said."""
    if code not in OUTDATED - {"InvalidAccessKeyId"} and code != "400":
        return ""
    have = "have" if code.startswith("Expired") else "may have"
    renewed = "variables are not renewed in mid-run; a file, a process or a role is"
    return f"; the credentials {have} expired, and there are no newer ones: {renewed}"


def _of_a_role(error: ClientError) -> bool:
    """Whether a role was refused: STS answers 400 to a token that is old or not its own."""
    return error.operation_name.startswith("AssumeRole") and 400 <= status_of(error) < 500
