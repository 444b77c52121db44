"""Log lines: for people as ever, for machines one JSON object each, and no secret in either."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moleblend_ray import cli
from moleblend_ray.errors import ConfigError
from moleblend_ray.orchestration.progress import logs

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG+example",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef",
    "RAY_AUTH_TOKEN": "feedfacefeedfacefeedface",
    "GCS_PASSWORD": "correct horse battery",
}


@pytest.fixture(autouse=True)
def no_context() -> Iterator[None]:
    logs._context.clear()
    yield
    logs._context.clear()


@pytest.fixture
def json_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "json")


def record(message: str, *arguments: object, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord(
        "moleblend_ray.x", logging.WARNING, "x.py", 1, message, arguments, None
    )
    made.__dict__.update(extra)
    return made


def line_of(made: logging.LogRecord) -> dict[str, Any]:
    text = logs.JsonFormatter().format(made)
    assert "\n" not in text
    line = json.loads(text)
    assert isinstance(line, dict)
    return line


def test_a_line_says_when_where_and_what() -> None:
    logs.set_context(run="base-1", rank=3)
    line = line_of(record("odd molecule %d\nof two lines", 5, step=7, created=1000000000.25))
    assert line == {
        "time": "2001-09-09T01:46:40.250Z",
        "level": "WARNING",
        "logger": "moleblend_ray.x",
        "message": "odd molecule 5\nof two lines",
        "run": "base-1",
        "rank": 3,
        "step": 7,
    }


def test_what_is_not_known_is_left_out() -> None:
    assert set(line_of(record("hello"))) == {"time", "level", "logger", "message"}


def test_an_exception_is_a_field() -> None:
    try:
        raise ValueError("s3://user:hunter22@bucket/x")
    except ValueError:
        made = record("failed")
        made.exc_info = sys.exc_info()
    line = line_of(made)
    assert "Traceback" in line["exception"]
    assert "s3://***@bucket/x" in line["exception"]


def test_a_record_of_another_process_keeps_its_time_rank_and_text() -> None:
    logs.set_context(run="base-1")
    origin = {"created": 1000000000.0, "rank": 2, "step": 9, "prefix": "[rank 2] "}
    line = line_of(record("%s", "[rank 2] slow disk", origin=origin))
    assert line["time"] == "2001-09-09T01:46:40.000Z"
    assert (line["message"], line["rank"], line["step"]) == ("slow disk", 2, 9)
    assert line["run"] == "base-1"


@pytest.mark.parametrize("make", [logs.JsonFormatter, logs.TextFormatter])
@pytest.mark.parametrize("name", SECRETS)
def test_secrets_of_the_environment_reach_no_line(
    make: type[logging.Formatter], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, SECRETS[name])
    made = record("request with %s failed", SECRETS[name])
    made.exc_text = f"Traceback: {SECRETS[name]}"
    made.exc_info = (ValueError, ValueError(SECRETS[name]), None)
    shown = make().format(made)
    assert SECRETS[name] not in shown
    assert "request with *** failed" in shown


def test_settings_that_only_sound_like_secrets_are_shown() -> None:
    redacted = logs.Redactor(
        {
            "TOKENIZERS_PARALLELISM": "false",
            "RAY_AUTH_TOKEN_PATH": "/var/run/secrets/ray-token",
            "AWS_SHARED_CREDENTIALS_FILE": "/home/someone/.aws/credentials",
            "HOME": "/home/someone",
        }
    )
    text = "false /var/run/secrets/ray-token /home/someone/.aws/credentials"
    assert redacted(text) == text


def test_a_secret_that_begins_another_does_not_uncover_its_end() -> None:
    redacted = logs.Redactor({"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefghijkl"})
    assert redacted("abcdefghijkl abcdefgh") == "*** ***"


def test_the_default_is_lines_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(logs.FORMAT_VARIABLE, raising=False)
    shown = logs.console_formatter().format(record("hello"))
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING hello", shown)


def test_an_unknown_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "xml")
    with pytest.raises(ConfigError, match="MOLEBLEND_LOG_FORMAT: expected text or json"):
        logs.console_formatter()
    assert cli.main(["prepare", "source=x", "out=y", "--dry-run"]) == cli.EXIT_CONFIG


def test_the_console_shows_one_object_a_line_beside_a_progress_bar(
    json_logs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tqdm import tqdm

    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with cli.console_logging(), tqdm(total=3, file=screen) as bar:
        for number in range(3):
            bar.update()
            logging.getLogger("moleblend_ray.y").info("number %d", number)
    lines = [part for part in re.split(r"[\r\n]", screen.getvalue()) if part.startswith("{")]
    assert [json.loads(line)["message"] for line in lines] == [f"number {n}" for n in range(3)]


def test_the_error_that_ends_a_command_is_a_line_too(
    json_logs: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    status = cli.main(["prepare", f"source=/no/{SECRETS['WANDB_API_KEY']}", "out=y"])
    assert status == cli.EXIT_ERROR
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[-1]["level"] == "ERROR"
    assert lines[-1]["message"].startswith("moleblend prepare: ")
    assert "/no/***" in lines[-1]["message"]
    assert lines[-1]["run"].endswith("/y")


@pytest.mark.parametrize(
    ("out", "name"),
    [
        ("s3://bucket/runs/base-1/", "runs/base-1"),
        ("s3://bucket/runs/base-1/pretrain", "base-1/pretrain"),
        ("s3://bucket", "bucket"),
        ("/home/someone/runs/esol", "runs/esol"),
        ("esol", "esol"),
        ("s3://user:secret@bucket/esol", "***@bucket/esol"),
        ("https://host/run?X-Amz-Signature=secret", "host/run"),
        ("/", "unnamed"),
        ("x" * 999, "x" * 128),
    ],
)
def test_a_run_is_named_by_the_end_of_its_uri(out: str, name: str) -> None:
    assert logs.run_name(out) == name


def test_a_worker_s_file_holds_its_records_from_info_up(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "worker.jsonl"
    code = (
        "import logging; from pathlib import Path; from moleblend_ray.orchestration.progress import logs\n"
        f"for _ in range(2): logs.log_to_file(Path({str(path)!r}))\n"
        "logs.set_context(rank=1)\n"
        "log = logging.getLogger('moleblend_ray.z')\n"
        "log.debug('too much'); log.info('committed'); log.warning('slow')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["level"], line["message"], line["rank"]) for line in lines] == [
        ("INFO", "committed", 1),
        ("WARNING", "slow", 1),
    ]
