"""What storage backends raise -> a StorageError that says what was tried, where, why it failed, and what to do."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from moleblend_ray.data.files.retry import http_status, s3_error
from moleblend_ray.data.files.storage_clients import GOOGLE, S3, is_web, protocol_of
from moleblend_ray.errors import HIDDEN, StorageError

_GONE: Final = frozenset({404, 410})
"""HTTP status: there is no such file."""

_ADVICE: Final = {
    "InvalidAccessKeyId": "the access key is not known there. Check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL.",
    "SignatureDoesNotMatch": "the secret key does not fit the access key. Check AWS_SECRET_ACCESS_KEY.",
    "ExpiredToken": "the session token has expired. Get new temporary credentials and start again.",
    "InvalidToken": "the session token is not valid. Correct or unset AWS_SESSION_TOKEN.",
    "RequestTimeTooSkewed": "this machine's clock differs from the server's. Set it (NTP).",
    "AuthorizationHeaderMalformed": "the bucket is in another region. Set AWS_REGION or AWS_DEFAULT_REGION to its region.",
    "PermanentRedirect": "the bucket is in another region. Set AWS_REGION or AWS_DEFAULT_REGION to its region.",
}
"""S3 error code -> what it means and what to do."""


class NotFoundError(StorageError):
    """Nothing exists at the URI (the storage itself answered)."""


@contextmanager
def translate_errors(action: str, uri: str) -> Iterator[None]:
    """Turn what a storage backend raises inside the block into a StorageError about ``uri``."""
    try:
        yield
    except StorageError:
        raise
    except _backend_errors() as error:
        raise _explain(action, uri, error) from error
    except ValueError as error:
        # botocore's, where there is no scheme, or a host name with an underscore.
        if not str(error).startswith("Invalid endpoint"):
            raise
        raise _explain(action, uri, error) from error


def _backend_errors() -> tuple[type[Exception], ...]:
    """The exceptions of backends; only looked up after an exception, as botocore is slow to import."""
    # NotImplementedError: a read-only backend such as https asked to write.
    errors: tuple[type[Exception], ...] = (OSError, NotImplementedError)
    if "aiohttp" in sys.modules:
        errors = (*errors, sys.modules["aiohttp"].ClientError)
    if "gcsfs.retry" in sys.modules:
        gcsfs, tokens = sys.modules["gcsfs.retry"], sys.modules["google.auth.exceptions"]
        errors = (*errors, gcsfs.HttpError, gcsfs.ChecksumError, tokens.GoogleAuthError)
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return errors
    return (*errors, BotoCoreError, ClientError)


def _explain(action: str, uri: str, error: Exception) -> StorageError:
    """The StorageError for a failure: what was tried, where, why it failed, what to do."""
    reason = " ".join(str(error).split()) or type(error).__name__
    # botocore repeats user:password@bucket without the scheme that `without_credentials` looks for.
    if user := re.match(r"\w+://([^/@]+)@", uri):
        reason = reason.replace(f"{user[1]}@", f"{HIDDEN}@")
    failed = f"Cannot {action} {uri}: "
    advice = _ADVICE.get(s3_error(error)[0])
    if advice is None and (missing := _missing(error, reason)) is not None:
        return NotFoundError(failed + missing)
    return StorageError(failed + (advice or _why(action, uri, error, reason)))


def _missing(error: Exception, reason: str) -> str | None:
    """What is not there; None if something else went wrong."""
    if isinstance(error, FileNotFoundError):
        if "bucket" in reason.lower():
            return "the bucket does not exist. Create it or correct the URI."
        return "it does not exist. Check the spelling of the URI."
    if isinstance(error, NotADirectoryError):
        # As in object stores, where nothing stops a path from going on below a file: nothing is there.
        return "a part of this path is a file, not a directory."
    return None


def _why(action: str, uri: str, error: Exception, reason: str) -> str:
    """What went wrong with what is there or may be, and what to do."""
    kind = type(error).__name__
    if isinstance(error, IsADirectoryError):
        return "it is a directory, where a file is expected."
    if (lacking := _lacking_credentials(uri, error, reason)) is not None:
        return lacking
    if kind == "EndpointResolutionError" or reason.startswith("Invalid endpoint"):
        return (
            f"the address of its server is none ({reason}). Correct AWS_ENDPOINT_URL; expected http://HOST:PORT or "
            "https://HOST, without an underscore in the name of the host."
        )
    if isinstance(error, PermissionError) and protocol_of(uri) == "file":
        return f"access was denied ({reason}). Check the owner and the rights of the path."
    # gcsfs tells a refusal by the text of an OSError.
    is_refused = http_status(error) in (401, 403) or reason.startswith("Forbidden:")
    if is_refused or isinstance(error, PermissionError):
        return (
            f"access was denied ({reason}). Check the credentials, and whether they may {action} there (the bucket may be "
            "read-only for them)."
        )
    if isinstance(error, NotImplementedError):
        return "this kind of storage does not support it."
    if isinstance(error, ConnectionError | TimeoutError) or "Connect" in kind or "Timeout" in kind:
        return f"the storage cannot be reached ({reason}). Check the network{_and_address(uri)}."
    return f"{kind}: {reason}"


def _lacking_credentials(uri: str, error: Exception, reason: str) -> str | None:
    """Where credentials are looked for, if the error is that there are none; else None."""
    kind = type(error).__name__
    if kind in {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}:
        return (
            "no credentials were found. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine "
            "a role."
        )
    is_refused_by_google = http_status(error) == 401 and protocol_of(uri) in GOOGLE
    if kind in {"DefaultCredentialsError", "RefreshError"} or is_refused_by_google:
        return (
            f"no valid credentials were found ({reason}). Run `gcloud auth application-default login`, set "
            "GOOGLE_APPLICATION_CREDENTIALS, or give the machine a service account."
        )
    return None


def _and_address(uri: str) -> str:
    """What else may be wrong where a storage does not answer: what says where it is, if anything does."""
    if is_web(uri):
        return " and the address"
    return " and AWS_ENDPOINT_URL" if protocol_of(uri) in S3 else ""


def unmasked(uri: str, call: Callable[[], Any]) -> Any:
    """The result of ``call``. For fsspec, a web server that is down or refuses has no such file: raise what is behind it."""
    try:
        return call()
    except FileNotFoundError as error:
        cause = error.__cause__
        if not is_web(uri) or not isinstance(cause, _backend_errors()):
            raise
        if http_status(cause) in _GONE:
            raise
        raise cause from None
