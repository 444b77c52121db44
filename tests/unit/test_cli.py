"""The command: what it prints, and its exit status."""

from __future__ import annotations

import gc
import io
import json
import math
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import get_args

import pytest

import moleblend_ray
from moleblend_ray import cli
from moleblend_ray.config.compose import load_config
from moleblend_ray.config.inspect import InspectConfig
from moleblend_ray.config.submit import SubmitConfig
from moleblend_ray.errors import ConfigError, StorageError
from moleblend_ray.orchestration.submit import SubmitSummary
from moleblend_ray.settings import field_types

REPOSITORY = Path(__file__).resolve().parents[2]
PREPARE = ["prepare", "source=s3://key:secret@bucket/x.csv", "out=runs/data"]


@dataclass(frozen=True)
class Summary:
    rows_in: int
    reasons: dict[str, float]


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


@pytest.mark.parametrize("job", list(cli.JOBS))
def test_the_example_in_the_help_of_a_job_is_a_call_that_it_accepts(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    example = cli.JOBS[job].example
    assert f"Example: moleblend {job} {example}\n" in cli.job_help(job)
    assert cli.main([job, *shlex.split(example), "--dry-run"]) == 0
    assert "nothing was read or written" in capsys.readouterr().out


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
    assert "moleblend_ray.orchestration.preparation.prepare.prepare" in shown
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


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_an_encoding_that_lacks_a_character_does_not_end_a_command(
    options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_prepare(monkeypatch, lambda config: Summary(rows_in=7, reasons={"größe": 2}))
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    assert cli.main([*PREPARE, *options]) == 0
    shown = buffer.getvalue().decode("ascii")
    if options:
        assert json.loads(shown)["reasons"] == {"größe": 2}
    else:
        assert "gr??e" in shown


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


@dataclass(frozen=True)
class Rejections:
    """As summaries of molecules tell of them."""

    all_rejected: bool


@pytest.mark.parametrize(("all_rejected", "status"), [(False, 0), (True, cli.EXIT_ERROR)])
def test_a_command_that_no_molecule_came_out_of_fails(
    monkeypatch: pytest.MonkeyPatch, all_rejected: bool, status: int
) -> None:
    stub_prepare(monkeypatch, lambda config: Rejections(all_rejected))
    assert cli.main(PREPARE) == status


def test_an_unknown_key_exits_2_and_names_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*PREPARE, "rows_per_chnk=3"]) == 2
    assert "did you mean rows_per_chunk?" in capsys.readouterr().err


@pytest.mark.parametrize("job", list(cli.JOBS))
def test_every_command_prints_its_summary_as_one_json_object(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(config: object) -> Summary:
        print("a line of a library")
        return Summary(rows_in=7, reasons={"empty_molecule": math.inf})

    stub(monkeypatch, cli.JOBS[job].function, work)
    assert cli.main([job, *least_arguments(job), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found == {"rows_in": 7, "reasons": {"empty_molecule": None}}
    assert "a line of a library" in captured.err


@pytest.mark.parametrize("job", [name for name, job in cli.JOBS.items() if job.show])
def test_the_setting_format_does_the_same_where_there_is_one(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, cli.JOBS[job].function, lambda config: Summary(rows_in=7, reasons={}))
    assert cli.main([job, *least_arguments(job), "format=json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows_in": 7, "reasons": {}}
    assert cli.main([job, *least_arguments(job), "format=xml"]) == 2
    assert "format: expected one of text, json, found 'xml'" in capsys.readouterr().err


def test_with_json_a_dry_run_prints_the_settings_as_one_object(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([*PREPARE, "--dry-run", "--json"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(shown)
    assert found["config"]["rows_per_chunk"] == 8192
    assert found["paths"]["out"].endswith("/runs/data")
    assert "secret" not in shown


def test_with_json_a_run_stopped_before_its_end_keeps_its_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Stoppable:
        finished: bool

    stub_prepare(monkeypatch, lambda config: Stoppable(finished=False))
    assert cli.main([*PREPARE, "--json"]) == 75
    assert json.loads(capsys.readouterr().out) == {"finished": False}


def test_a_submission_prints_json_of_its_own_and_the_log_elsewhere(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(config: SubmitConfig, job_config: object) -> SubmitSummary:
        print("the log of the job")
        assert config.overrides == ("data=s3://b/d", "verify=true")
        return SubmitSummary(submission_id="data-1", status="FAILED", exit_status=3, seconds=1.0)

    stub(monkeypatch, "moleblend_ray.orchestration.submit:submit", submit)
    assert cli.main(["submit", "data", "s3://b/d", "--json", "--verify"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["submission_id"] == "data-1"
    assert "the log of the job" in captured.err


def test_an_unknown_option_exits_2_and_says_how_settings_are_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["status", "runs/first", "--xml"])
    assert "--xml; settings are KEY=VALUE: moleblend status --help" in capsys.readouterr().err


def test_settings_that_are_written_as_options_are_shown_as_they_should_be(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["pretrain", "--data", "runs/data", "--train.num-steps=3"])
    assert "(did you mean data=runs/data train.num_steps=3?)" in capsys.readouterr().err


def test_a_path_that_is_not_set_is_not_among_the_settings_that_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["pretrain", "data=nowhere", "out=runs/run"]) == cli.EXIT_ERROR
    shown = capsys.readouterr().out
    assert f"{Path.cwd()}/nowhere" in shown.replace("\n", "")
    assert "tracking.dir" not in shown


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moleblend_ray", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, moleblend_ray.__version__)
    wrong = subprocess.run(
        [sys.executable, "-m", "moleblend_ray", "pretrian"], capture_output=True, text=True
    )
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean pretrain?" in wrong.stderr


@pytest.mark.parametrize(
    "arguments", ["pretrain --help", "plan molecules=1e6 gpus=1 --json", "--version"]
)
def test_a_reader_that_has_seen_enough_gets_no_traceback(arguments: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "moleblend_ray", *arguments.split()],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("job", list(cli.JOBS))
def test_every_command_has_a_script_to_submit(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = REPOSITORY / "jobs" / f"{job}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"moleblend {job} ")


def test_an_unknown_job_exits_2_and_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrian", "out=x"]) == 2
    assert "did you mean pretrain?" in capsys.readouterr().err


def test_every_exported_name_can_be_imported() -> None:
    assert all(getattr(moleblend_ray, name) is not None for name in moleblend_ray.__all__)


def classes_in(config: type) -> set[type]:
    """The configuration class, those of its sections, at every depth, and the enumerations of their values."""
    inner: set[type] = set()
    for annotation in field_types(config).values():
        for kind in (annotation, *get_args(annotation)):
            if isinstance(kind, type) and is_dataclass(kind):
                inner |= classes_in(kind)
            elif isinstance(kind, type) and issubclass(kind, Enum):
                inner.add(kind)
    return {config, *inner}


@pytest.mark.parametrize("job", list(cli.JOBS))
def test_a_configuration_can_be_written_in_python_with_exported_names_alone(job: str) -> None:
    for cls in classes_in(cli.load_reference(cli.JOBS[job].config)):
        assert getattr(moleblend_ray, cls.__name__, None) is cls


def stub_prepare(monkeypatch: pytest.MonkeyPatch, function: object) -> None:
    stub(monkeypatch, cli.JOBS["prepare"].function, function)


def stub(monkeypatch: pytest.MonkeyPatch, reference: str, function: object) -> None:
    """Let ``function`` take the place of what ``reference`` names."""
    load = cli.load_reference
    monkeypatch.setattr(
        cli, "load_reference", lambda other: function if other == reference else load(other)
    )


def least_arguments(job: str) -> list[str]:
    """Arguments without which the job does not begin."""
    first = cli.JOBS[job].first_key
    required = {
        "download": ["qm9"],
        "plan": ["molecules=1e6", "gpus=8"],
        "prepare": ["source=a.csv"],
        "pretrain": ["data=d"],
        "finetune": ["task=esol", "task.source=a.csv"],
        "sweep": ["task=esol", "task.source=a.csv"],
        "refit": ["results=r"],
        "embed": ["checkpoint=c", "source=a.csv"],
        "predict": ["models=m", "source=a.csv"],
        "export": ["checkpoint=c"],
    }
    writes_nothing = ("data", "checkpoints", "plan", "status")
    out = [] if job in writes_nothing else ["out=runs/o.parquet"]
    return [*required.get(job, ["x"] if first else []), *out]


@pytest.mark.parametrize(
    ("given", "spelled"),
    [
        (["s3://bucket/mols"], ["data=s3://bucket/mols"]),
        (["runs/it's here"], ["data='runs/it\\'s here'"]),
        (["data=x", "--verify"], ["data=x", "verify=true"]),
        (["examples=1"], ["examples=1"]),
        (["~/runs/demo"], ["data='~/runs/demo'"]),
        (["~"], ["data='~'"]),
        (["~examples"], ["~examples"]),
    ],
)
def test_a_bare_first_argument_is_the_main_setting_of_its_job(
    given: list[str], spelled: list[str]
) -> None:
    assert cli._spelled_out(cli.JOBS["data"], given) == spelled
    config = load_config(InspectConfig, "data", cli._spelled_out(cli.JOBS["data"], ["a b/'c'=1"]))
    assert config.data == "a b/'c'=1"


def test_a_quoted_home_is_a_path_and_no_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["status", "~/demo"]) == cli.EXIT_ERROR
    assert f"{tmp_path}/demo holds nothing that a command" in capsys.readouterr().err
    assert cli.main(["finetune", "~/demo"]) == cli.EXIT_CONFIG
    assert "override '~/demo': expected KEY=VALUE" in capsys.readouterr().err


def test_looking_at_a_place_without_data_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "--verify", str(tmp_path)]) == cli.EXIT_ERROR
    assert "not a prepared data set" in capsys.readouterr().err


@pytest.mark.parametrize("job", ["prepare", "sweep"])
def test_sigterm_ends_every_job_by_status_75_and_leaves_its_handler_behind(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = []

    def work(config: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except SystemExit:
            sys.exit(1)  # as Ray does where the signal interrupts a wait for its results
        finally:
            closed.append(config)  # as a cluster that was started is

    stub(monkeypatch, cli.JOBS[job].function, work)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main([job, *least_arguments(job)]) == 75
    assert len(closed) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert "stopped by SIGTERM; the same command continues" in capsys.readouterr().err


def test_no_garbage_is_looked_for_while_a_command_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "works.py").write_text("import gc\nlooked = gc.isenabled()\n")
    (tmp_path / "fails.py").write_text("raise ImportError\n")
    assert cli.load_reference("works:looked") is False
    assert gc.isenabled()
    with pytest.raises(ImportError):
        cli.load_reference("fails:looked")
    assert gc.isenabled()
