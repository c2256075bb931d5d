"""What botocore raises, as errors of ours: by type, status and code: messages may be missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as NoConnectionError

from ..errors import AccessError, CrowdlayerError, SettingsError, StoreError, one_line


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
        if code == "NoSuchBucket":
            raise SettingsError(f"{thing}: the bucket must exist, {bucket!r} does not") from error
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


def status_of(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _of_a_role(error: ClientError) -> bool:
    """Whether a role was refused: STS answers 400 to a token that is old or not its own."""
    return error.operation_name.startswith("AssumeRole") and 400 <= status_of(error) < 500
