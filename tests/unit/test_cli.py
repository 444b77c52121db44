"""The command: what it prints, and its exit status."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import moleblend_ray
from moleblend_ray import cli
from moleblend_ray.config.compose import load_config
from moleblend_ray.config.inspect import InspectConfig
from moleblend_ray.errors import ConfigError, StorageError

PREPARE = ["prepare", "source=s3://key:secret@bucket/x.csv", "out=runs/data"]


@dataclass(frozen=True)
class Summary:
    rows_in: int
    reasons: dict[str, int]


def test_help_lists_every_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {job} " in shown for job in cli.JOBS)


@pytest.mark.parametrize("job", list(cli.JOBS))
def test_help_of_a_job_lists_its_keys_with_types_and_defaults(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([job, "--help"]) == 0
    keys = {"data": "data", "checkpoints": "run", "leaderboard": "run", "status": "run"}
    expected = "gpus: int = 0" if job == "plan" else f"{keys.get(job, 'out')}: str required"
    assert expected in capsys.readouterr().out


def test_without_a_job_the_jobs_are_shown_and_the_status_is_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([]) == 2
    assert "Jobs:" in capsys.readouterr().out


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == moleblend_ray.__version__


def test_dry_run_prints_settings_and_paths_hides_secrets_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*PREPARE, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "rows_per_chunk: 8192" in shown
    assert "moleblend_ray.orchestration.prepare.prepare" in shown
    assert str(tmp_path / "runs/data") in shown
    assert "secret" not in shown
    assert list(tmp_path.iterdir()) == []


def test_a_run_stopped_before_its_end_has_a_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass(frozen=True)
    class Stoppable:
        finished: bool

    for finished, status in ((True, 0), (False, 75)):
        stub_prepare(monkeypatch, lambda config, finished=finished: Stoppable(finished))
        assert cli.main(PREPARE) == status


def test_a_run_ends_with_a_table_of_what_and_where(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_prepare(monkeypatch, lambda config: Summary(rows_in=7, reasons={"empty_molecule": 2}))
    assert cli.main(PREPARE) == 0
    shown = capsys.readouterr().out
    assert "rows in" in shown
    assert "reasons.empty molecule" in shown
    assert "runs/data" in shown
    assert "secret" not in shown


@pytest.mark.parametrize(("error", "status"), [(ConfigError, 2), (StorageError, 1)])
def test_errors_of_the_project_print_without_traceback(
    error: type[Exception],
    status: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(config: object) -> None:
        raise error("bucket [x] is missing")

    stub_prepare(monkeypatch, fail)
    assert cli.main(PREPARE) == status
    shown = capsys.readouterr().err
    assert "moleblend prepare: bucket [x] is missing" in shown
    assert "Traceback" not in shown


def test_an_error_from_a_ray_task_is_shown_as_its_cause(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import RayTaskError

    def fail(config: object) -> None:
        remote = RayTaskError(
            "read", "Traceback: remote lines", ConfigError("source: no such column")
        )
        raise remote.as_instanceof_cause()

    stub_prepare(monkeypatch, fail)
    assert cli.main(PREPARE) == 2
    assert capsys.readouterr().err.strip() == "moleblend prepare: source: no such column"


def test_an_interrupt_says_that_the_same_command_continues(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(config: object) -> None:
        raise KeyboardInterrupt

    stub_prepare(monkeypatch, interrupt)
    assert cli.main(PREPARE) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_an_unknown_key_exits_2_and_names_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*PREPARE, "rows_per_chnk=3"]) == 2
    assert "did you mean rows_per_chunk?" in capsys.readouterr().err


@pytest.mark.parametrize("job", [name for name, job in cli.JOBS.items() if job.show])
def test_every_command_that_shows_something_prints_json_by_the_same_setting(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = cli.JOBS[job].first_key
    words = [job, f"{first}=x"] if first else [job, "molecules=1e6", "gpus=8"]
    assert cli.main([*words, "format=json", "--dry-run"]) == 0
    assert "format: json" in capsys.readouterr().out
    assert cli.main([*words, "format=xml"]) == 2
    assert "format: expected one of text, json, found 'xml'" in capsys.readouterr().err
    assert "format" not in cli.JOBS[job].flags
    assert "json" not in cli.JOBS[job].flags


def test_an_unknown_option_exits_2_and_says_how_settings_are_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["status", "runs/first", "--json"])
    assert "--json; settings are KEY=VALUE: moleblend status --help" in capsys.readouterr().err


def test_an_unknown_job_exits_2_and_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrian", "out=x"]) == 2
    assert "did you mean pretrain?" in capsys.readouterr().err


def test_every_exported_name_can_be_imported() -> None:
    assert all(getattr(moleblend_ray, name) is not None for name in moleblend_ray.__all__)


def stub_prepare(monkeypatch: pytest.MonkeyPatch, function: object) -> None:
    load = cli.load_reference
    monkeypatch.setattr(
        cli,
        "load_reference",
        lambda reference: function if reference.endswith(":prepare") else load(reference),
    )


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        (["s3://bucket/mols"], ["data=s3://bucket/mols"]),
        (["runs/it's here"], ["data='runs/it\\'s here'"]),
        (["data=x", "--verify"], ["data=x", "verify=true"]),
        (["examples=1"], ["examples=1"]),
    ],
)
def test_a_bare_first_argument_is_the_main_setting_of_its_job(
    given: list[str], spelled: list[str]
) -> None:
    assert cli._spelled_out(cli.JOBS["data"], given) == spelled
    config = load_config(InspectConfig, "data", cli._spelled_out(cli.JOBS["data"], ["a b/'c'=1"]))
    assert config.data == "a b/'c'=1"


def test_looking_at_a_place_without_data_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "--verify", str(tmp_path)]) == cli.EXIT_ERROR
    assert "not a prepared data set" in capsys.readouterr().err
