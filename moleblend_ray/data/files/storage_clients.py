"""URI -> the client of its storage, with its settings: what is known of protocols and environment variables."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, Final
from urllib.parse import urlsplit

import fsspec

from moleblend_ray.data.files.retry import timeout_seconds
from moleblend_ray.errors import StorageError

_S3_ENVIRONMENT: Final = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "MOLEBLEND_STORAGE_TIMEOUT_S",
)
"""Settings that an S3 client reads only when it is created: with other values, another client is needed."""

S3: Final = frozenset({"s3", "s3a"})
GOOGLE: Final = frozenset({"gs", "gcs"})

RANGED: Final = S3 | GOOGLE
"""Protocols whose servers all support range requests."""

_PART_BYTES: Final = 16 << 20
"""Size of the parts of a multipart upload; files of two or more parts are uploaded so."""

_PARALLEL_PARTS: Final = 4
"""Parts that are uploaded at the same time, which bounds the memory of an upload to 64 MiB."""


def is_local(uri: str) -> bool:
    """Whether the URI is a path on this machine."""
    return protocol_of(uri) == "file"


def is_web(uri: str) -> bool:
    """Whether the URI is a web address."""
    return protocol_of(uri) in {"http", "https"}


def protocol_of(uri: str) -> str:
    """What stands before ``://``; ``file`` for a plain path."""
    protocol, separator, _ = uri.partition("://")
    return protocol if separator else "file"


def resolve(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it."""
    if not uri:
        raise StorageError(
            "The URI is empty; expected a path or something like s3://bucket/prefix."
        )
    if is_web(uri):
        try:
            urlsplit(uri)
        except ValueError as error:
            raise StorageError(f"{uri} is not a web address ({error}). Correct it.") from error
    protocol = protocol_of(uri)
    is_s3 = protocol in S3
    environment = tuple(os.environ.get(name) for name in _S3_ENVIRONMENT) if is_s3 else ()
    filesystem = _filesystem(protocol, environment, os.getpid())
    return filesystem, str(filesystem._strip_protocol(uri))


@lru_cache(maxsize=16)
def _filesystem(protocol: str, environment: tuple[str | None, ...], process: int) -> Any:
    """One client per protocol, environment and process (a client cannot be used after a fork)."""
    del environment, process  # only part of the cache's key
    options: dict[str, Any] = {"skip_instance_cache": True}
    if protocol in S3:
        options |= {
            "use_listings_cache": False,
            "config_kwargs": {"connect_timeout": 10, "read_timeout": timeout_seconds()},
        }
        region = os.environ.get("AWS_REGION")
        # The client itself reads AWS_DEFAULT_REGION only; without a region it signs for us-east-1.
        if region and not os.environ.get("AWS_DEFAULT_REGION"):
            options["client_kwargs"] = {"region_name": region}
    elif protocol in GOOGLE:
        options["use_listings_cache"] = False
    try:
        return fsspec.filesystem(protocol, **options)
    except ValueError as error:
        known = "a plain path, file://, s3://, gs://, https://"
        raise StorageError(f"Unknown kind of storage {protocol}://; expected {known}.") from error
    except (ImportError, OSError) as error:
        # OSError: a package that finds a library of the system missing (hdfs://).
        extra = " (pip install gcsfs)" if protocol in GOOGLE else ""
        reason = str(error).partition("\n")[0]
        raise StorageError(
            f"{protocol}:// needs software that is not installed{extra}: {reason}"
        ) from error


def with_protocol(asked: str, path: str) -> str:
    """A path that a backend found as a URI: plain if local, otherwise with the protocol of ``asked``."""
    return path if is_local(asked) else f"{protocol_of(asked)}://{path.split('://', 1)[-1]}"


def part_options(uri: str) -> dict[str, int]:
    """How uploads to S3 are cut into parts; s3fs aborts an upload that fails, so that no parts are left over."""
    if protocol_of(uri) not in S3:
        return {}
    return {"chunksize": _PART_BYTES, "max_concurrency": _PARALLEL_PARTS}
