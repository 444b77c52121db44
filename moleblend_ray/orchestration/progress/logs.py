"""Log records as lines for people, or as one JSON object per line for machines (``MOLEBLEND_LOG_FORMAT=json``).

All lines are redacted in the same way: credentials in URIs, and the values of environment variables whose names say
that they are secret, are replaced by ``***``. This module does not import Ray, as the command line uses it as well.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from moleblend_ray.errors import HIDDEN, SECRET_NAME, ConfigError, without_credentials

PACKAGE: Final = "moleblend_ray"
FORMAT_VARIABLE: Final = "MOLEBLEND_LOG_FORMAT"

LogFormat = Literal["text", "json"]

_FIELDS: Final = ("run", "rank", "step")
"""Fields of a JSON line, if known, besides time, level, logger, message and exception."""
_PLACE: Final = re.compile(r"(?:path|file|dir|sock|domain|name)$", re.I)
"""Names of variables that say where a secret lies or what it is called, which is none."""
_SHORTEST_SECRET: Final = 8
"""Shortest value that is hidden: shorter ones (``true``) occur in many lines that contain no secret."""
_MAX_NAME: Final = 128
_MAX_FILE_BYTES: Final = 64 << 20

_context: dict[str, str | int] = {}


def log_format() -> LogFormat:
    """The format that the environment asks for, text or json."""
    text = os.environ.get(FORMAT_VARIABLE, "").strip().lower()
    if text in ("", "text"):
        return "text"
    if text == "json":
        return "json"
    raise ConfigError(f"{FORMAT_VARIABLE}: expected text or json, found {text!r}")


def set_context(**fields: str | int | None) -> None:
    """Set fields of the later JSON lines of this process: ``run``, ``rank``, ``step``; None removes a field."""
    for name, value in fields.items():
        assert name in _FIELDS, name
        if value is None:
            _context.pop(name, None)
        else:
            _context[name] = value


def context() -> dict[str, str | int]:
    """The present fields of the JSON lines of this process."""
    return dict(_context)


def run_name(out: str) -> str:
    """The name of the run or data set at the URI ``out`` in logs and metrics: its last two parts, without
    credentials."""
    shown = without_credentials(out)
    path = shown.partition("://")[2] or shown
    parts = [part for part in path.partition("?")[0].split("/") if part]
    return "/".join(parts[-2:])[:_MAX_NAME] or "unnamed"


class Redactor:
    """Hides credentials in texts, including the secrets that the environment has when the object is made."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        secrets = {
            value
            for name, value in (os.environ if environment is None else environment).items()
            if len(value) >= _SHORTEST_SECRET
            and SECRET_NAME.search(name)
            and not _PLACE.search(name)
        }
        # Longest first, as one may be the beginning of another.
        alternatives = "|".join(
            re.escape(value) for value in sorted(secrets, key=len, reverse=True)
        )
        self._secrets = re.compile(alternatives) if alternatives else None

    def __call__(self, text: str) -> str:
        """The text without credentials."""
        if self._secrets is not None:
            text = self._secrets.sub(HIDDEN, text)
        return without_credentials(text)


class TextFormatter(logging.Formatter):
    """A line for people, followed by the traceback if there is an exception."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
        self._redacted = Redactor()

    def format(self, record: logging.LogRecord) -> str:
        """The line, redacted."""
        return self._redacted(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message`` and, if known, ``run``,
    ``rank``, ``step``, ``exception``."""

    def __init__(self) -> None:
        super().__init__()
        self._redacted = Redactor()

    def format(self, record: logging.LogRecord) -> str:
        """The line, redacted."""
        # A record from another process says when and where it was made.
        origin: Mapping[str, Any] = getattr(record, "origin", {})
        created = datetime.fromtimestamp(origin.get("created", record.created), UTC)
        line: dict[str, Any] = {
            "time": created.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage().removeprefix(origin.get("prefix", "")),
        }
        for name in _FIELDS:
            value = origin.get(name, getattr(record, name, _context.get(name)))
            if value is not None:
                line[name] = value
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        elif "exception" in origin:
            line["exception"] = origin["exception"]
        for name, value in line.items():
            if isinstance(value, str):
                line[name] = self._redacted(value)
        return json.dumps(line, ensure_ascii=False)


def json_line(level: int, message: str) -> str | None:
    """A JSON line with this message if logs are JSON, else None."""
    if os.environ.get(FORMAT_VARIABLE, "").strip().lower() != "json":
        return None
    record = logging.LogRecord(PACKAGE, level, __file__, 0, "%s", (message,), None)
    return JsonFormatter().format(record)


def console_formatter() -> logging.Formatter:
    """The formatter that the environment asks for."""
    return JsonFormatter() if log_format() == "json" else TextFormatter()


def origin_of(record: logging.LogRecord, prefix: str) -> dict[str, Any]:
    """What is sent with a record to another process, which writes it as a JSON line."""
    origin: dict[str, Any] = {**_context, "created": record.created, "prefix": prefix}
    if record.exc_info:
        origin["exception"] = logging.Formatter().formatException(record.exc_info)
    return origin


class _WorkerFile(logging.handlers.RotatingFileHandler):
    """A class of its own, so that it can be told apart from other handlers."""


def log_to_file(path: Path) -> None:
    """Write the package's log records of this process, from INFO up, as JSON lines to ``path`` (at most 128 MiB)."""
    package_logger = logging.getLogger(PACKAGE)
    if any(isinstance(handler, _WorkerFile) for handler in package_logger.handlers):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = _WorkerFile(path, maxBytes=_MAX_FILE_BYTES, backupCount=1, delay=True)
    handler.setFormatter(JsonFormatter())
    handler.setLevel(logging.INFO)
    package_logger.addHandler(handler)
    if package_logger.getEffectiveLevel() > logging.INFO:
        package_logger.setLevel(logging.INFO)
