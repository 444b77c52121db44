"""The exception family.

Every error a user can cause or cure is a :class:`MoleBlendError`; its message says what happened, where,
what was found, what was expected and what to do. Command-line entry points print these without a traceback.
Messages go into logs and records, so none of them shows the credentials that a URI may hold.
"""

from __future__ import annotations

import re
from typing import Final

HIDDEN: Final = "***"

SECRET_NAME: Final = re.compile(
    # Not PWD and OLDPWD, which are folders.
    r"secret|token|passw|_pwd$|passphrase|(?:^|_|pg)pass$|credential|signature|cookie|connection_?string"
    r"|(?:api|access|account|private)_?key|(?:^|_)keys?$|auth(?!or)|authoriz",
    re.I,
)
"""Names of environment variables whose values are nobody else's business."""

_USER: Final = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://)"
    # Up to the last @, as parsers of URLs do: a password may hold others.
    r"(?:[^/\s\"'<>]+@"
    # Keys with slashes that nobody quoted; a number up to the first slash is a port.
    r"|[^/\s:@\[]+:(?!\d+/)[^\s,\"'<>]+@)",
    re.I,
)
_PARAMETER: Final = re.compile(
    # What a presigned URI carries: the secret, and what differs each time the same file is signed again.
    r"(?P<name>[?&#;](?:[^=&\s]*(?:secret|token|passw|pwd|credential|signature|key|auth(?!or))[^=&\s]*"
    r"|x-(?:amz|goog)-[^=&\s]*|expires|sig|s[etpv]))="
    # A sentence may go on after the URI.
    r"[^&\s\"'<>]+?(?=[.,:;)\]}]*(?:[&\s\"'<>]|\Z))",
    re.I,
)


def without_credentials(text: str) -> str:
    """The text with user names, passwords and signatures in the URIs it holds replaced by ``***``."""
    return _PARAMETER.sub(rf"\g<name>={HIDDEN}", _USER.sub(rf"\g<scheme>{HIDDEN}@", text))


class MoleBlendError(Exception):
    """Base of every error this package raises on purpose."""

    def __init__(self, *args: object) -> None:
        """Arguments as of any exception; credentials in texts are hidden."""
        super().__init__(
            *(without_credentials(item) if isinstance(item, str) else item for item in args)
        )


class ConfigError(MoleBlendError):
    """A setting is unknown, of the wrong type, out of range or contradicts another one."""


class StorageError(MoleBlendError):
    """A URI cannot be read, written or listed: missing, refused, or out of reach."""


class DataError(MoleBlendError):
    """A source file, shard, manifest or packed buffer is damaged, unsupported or incomplete."""


class CheckpointError(MoleBlendError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another run or model."""


class TrainingError(MoleBlendError):
    """Training cannot go on: a gap in the data order, a non-finite loss, a lost worker group."""
