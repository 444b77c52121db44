"""Log records as lines for people, or one JSON object a line for machines (``MOLEBLEND_LOG_FORMAT=json``).

Every line, of either kind, goes through the same redaction: credentials in URIs, and the values of environment
variables that are secrets by their names, are replaced by ``***``. Imports no Ray: the command line uses it as well.
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

from moleblend_ray.errors import HIDDEN, ConfigError, without_credentials

PACKAGE: Final = "moleblend_ray"
FORMAT_VARIABLE: Final = "MOLEBLEND_LOG_FORMAT"

LogFormat = Literal["text", "json"]

_FIELDS: Final = ("run", "rank", "step")
"""Of a JSON line, where known, besides time, level, logger, message and exception."""
_SECRET_VARIABLE: Final = re.compile(
    r"(?:secret|token|password|passwd|credential|api_?key|access_?key|signature)(?!.*(?:path|file|dir)$)",
    re.I,
)
_SHORTEST_SECRET: Final = 8
"""Of a value: shorter ones (``true``) stand in many lines that tell no secret."""
_MAX_NAME: Final = 128
_MAX_FILE_BYTES: Final = 64 << 20

_context: dict[str, str | int] = {}


def log_format() -> LogFormat:
    """What the environment asks for."""
    text = os.environ.get(FORMAT_VARIABLE, "").strip().lower()
    if text in ("", "text"):
        return "text"
    if text == "json":
        return "json"
    raise ConfigError(f"{FORMAT_VARIABLE}: expected text or json, found {text!r}")


def set_context(**fields: str | int | None) -> None:
    """What later JSON lines of this process say: ``run``, ``rank``, ``step``; None takes a field away."""
    for name, value in fields.items():
        assert name in _FIELDS, name
        if value is None:
            _context.pop(name, None)
        else:
            _context[name] = value


def context() -> dict[str, str | int]:
    """What this process's lines say at present."""
    return dict(_context)


def run_name(out: str) -> str:
    """What logs and metrics call the run or data set at the URI ``out``: its last two parts, without credentials."""
    shown = without_credentials(out)
    path = shown.partition("://")[2] or shown
    parts = [part for part in path.partition("?")[0].split("/") if part]
    return "/".join(parts[-2:])[:_MAX_NAME] or "unnamed"


class Redactor:
    """Hides credentials in texts. The secrets of the environment are those at the time when it is made."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        secrets = {
            value
            for name, value in (os.environ if environment is None else environment).items()
            if len(value) >= _SHORTEST_SECRET and _SECRET_VARIABLE.search(name)
        }
        # Longest first: one may be the beginning of another.
        alternatives = "|".join(
            re.escape(value) for value in sorted(secrets, key=len, reverse=True)
        )
        self._secrets = re.compile(alternatives) if alternatives else None

    def __call__(self, text: str) -> str:
        """The text without them."""
        if self._secrets is not None:
            text = self._secrets.sub(HIDDEN, text)
        return without_credentials(text)


class TextFormatter(logging.Formatter):
    """A line for people; an exception's traceback on the lines after it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S")
        self._redacted = Redactor()

    def format(self, record: logging.LogRecord) -> str:
        """The line, redacted."""
        return self._redacted(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message``, and where known ``run``,
    ``rank``, ``step``, ``exception``."""

    def __init__(self) -> None:
        super().__init__()
        self._redacted = Redactor()

    def format(self, record: logging.LogRecord) -> str:
        """The line, redacted."""
        # A record that another process has sent says itself when and where it was made.
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
    """A line of this module's own, where logs are JSON; None elsewhere."""
    if os.environ.get(FORMAT_VARIABLE, "").strip().lower() != "json":
        return None
    record = logging.LogRecord(PACKAGE, level, __file__, 0, "%s", (message,), None)
    return JsonFormatter().format(record)


def console_formatter() -> logging.Formatter:
    """The formatter that the environment asks for."""
    return JsonFormatter() if log_format() == "json" else TextFormatter()


def origin_of(record: logging.LogRecord, prefix: str) -> dict[str, Any]:
    """What a record takes along to another process, whose JSON line it becomes."""
    origin: dict[str, Any] = {**_context, "created": record.created, "prefix": prefix}
    if record.exc_info:
        origin["exception"] = logging.Formatter().formatException(record.exc_info)
    return origin


class _WorkerFile(logging.handlers.RotatingFileHandler):
    """Told apart from the handlers of others."""


def log_to_file(path: Path) -> None:
    """Write this process's records of the package, from INFO up, as JSON lines into ``path`` (at most 128 MiB)."""
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
