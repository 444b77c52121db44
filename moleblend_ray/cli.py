"""`moleblend JOB [KEY=VALUE ...]`: compose -> validate -> print -> call -> summary."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gc
import importlib
import io
import logging
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moleblend_ray.errors import ConfigError, MoleBlendError

logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """A job of the command line."""

    summary: str
    """One line for `moleblend --help`."""
    config: str
    """module:name of its configuration dataclass."""
    function: str
    """module:name of the function that takes the configuration and returns a summary dataclass."""
    example: str
    """Arguments of a usual call, as one types them in a shell."""
    first_key: str | None = None
    """Group or setting for a first argument without KEY=: `moleblend download qm9` is collection=qm9."""
    flags: tuple[str, ...] = ()
    """Settings that the option --NAME turns on: --verify is verify=true."""
    show: str | None = None
    """module:name of the function that takes the summary and returns what to print instead of the two tables."""


JOBS: Mapping[str, Job] = {
    "download": Job(
        "published files of a collection -> a directory or object store, resumed and verified",
        "moleblend_ray.config.download:DownloadConfig",
        "moleblend_ray.orchestration.download:download",
        "qm9 out=raw/qm9",
        first_key="collection",
    ),
    "prepare": Job(
        "molecules (SDF, CSV, SMILES, Parquet) -> checksummed shards, a manifest and a quarantine",
        "moleblend_ray.config.prepare:PrepareConfig",
        "moleblend_ray.orchestration.preparation.prepare:prepare",
        "source=molecules.csv out=runs/data featurize.conformers.generate=true",
    ),
    "data": Job(
        "what a prepared data set holds: counts, atoms, labels, quarantine, damaged files",
        "moleblend_ray.config.inspect:InspectConfig",
        "moleblend_ray.orchestration.data:inspect_data",
        "runs/data --verify",
        first_key="data",
        flags=("verify",),
        show="moleblend_ray.orchestration.data:show_data",
    ),
    "pretrain": Job(
        "shards -> a pretrained encoder; the same command again continues an interrupted run",
        "moleblend_ray.config.pretrain:PretrainConfig",
        "moleblend_ray.orchestration.pretraining.pretrain:pretrain",
        "data=runs/data out=runs/encoder model=mini experiment=views train.num_steps=4000",
    ),
    "checkpoints": Job(
        "checkpoints of a run: whole or damaged, differences between two, old ones deleted",
        "moleblend_ray.config.inspect:CheckpointsConfig",
        "moleblend_ray.orchestration.checkpoints:inspect_checkpoints",
        "runs/encoder keep_last=2",
        first_key="run",
        flags=("verify",),
        show="moleblend_ray.orchestration.checkpoints:show_checkpoints",
    ),
    "finetune": Job(
        "encoder + labelled molecules -> a property model and its scores",
        "moleblend_ray.config.downstream:FinetuneConfig",
        "moleblend_ray.orchestration.downstream.task_groups:finetune_or_tasks",
        "checkpoint=runs/encoder task.name=herg task.source=assay.csv 'task.columns=[blocker]' task.kind=classification out=runs/herg",
    ),
    "sweep": Job(
        "search of fine-tuning settings on validation molecules, then test scores of the chosen one",
        "moleblend_ray.config.downstream:SweepConfig",
        "moleblend_ray.orchestration.downstream.task_groups:sweep_or_tasks",
        "checkpoint=runs/encoder task=bbbp task.source=bbbp.csv.gz out=runs/bbbp num_trials=10",
    ),
    "refit": Job(
        "finished fine-tuning or sweep -> models for use, trained on all of its molecules",
        "moleblend_ray.config.downstream:RefitConfig",
        "moleblend_ray.orchestration.downstream.refit:refit_or_tasks",
        "results=runs/herg out=runs/herg-final",
    ),
    "leaderboard": Job(
        "results of several tasks, or of several sweeps of them -> tables, a page and a figure",
        "moleblend_ray.config.downstream:LeaderboardConfig",
        "moleblend_ray.orchestration.leaderboard:leaderboard",
        "runs/all 'against=[runs/scratch]' out=runs/compared",
        first_key="run",
    ),
    "embed": Job(
        "encoder + molecules -> one vector each, in the source's order",
        "moleblend_ray.config.downstream:EmbedConfig",
        "moleblend_ray.orchestration.library.embed:embed",
        "checkpoint=runs/encoder source=new.csv out=runs/vectors",
    ),
    "predict": Job(
        "fine-tuned models + molecules -> values or probabilities, their uncertainty, likeness to training",
        "moleblend_ray.config.downstream:PredictConfig",
        "moleblend_ray.orchestration.library.predict:predict",
        "models=runs/herg source=new.csv out=runs/predictions csv=true",
    ),
    "plan": Job(
        "hours, machines, bytes, cost and the limiting resource of a future run",
        "moleblend_ray.config.plan:PlanConfig",
        "moleblend_ray.orchestration.plan:plan",
        "molecules=1e9 gpus=64 model=base prices.gpu_hour=2.5",
        flags=("measure",),
        show="moleblend_ray.orchestration.plan_tables:show_plan",
    ),
    "status": Job(
        "how far a command is, from the files that it writes",
        "moleblend_ray.config.status:StatusConfig",
        "moleblend_ray.orchestration.status:status",
        "runs/encoder",
        first_key="run",
        show="moleblend_ray.orchestration.status:show_status",
    ),
    "export": Job(
        "checkpoint of a run -> model.safetensors and config.json",
        "moleblend_ray.config.tools:ExportConfig",
        "moleblend_ray.orchestration.export:export",
        "checkpoint=runs/encoder out=runs/model",
    ),
    "samples": Job(
        "write the project's own sample molecules, with conformers and labels",
        "moleblend_ray.config.tools:SamplesConfig",
        "moleblend_ray.orchestration.samples:samples",
        "out=runs/samples.parquet num_molecules=5000",
    ),
}

SUBMIT = "submit"
"""Not a job: with this word before a job, a cluster elsewhere runs it."""

EXIT_ERROR, EXIT_CONFIG, EXIT_UNFINISHED, EXIT_INTERRUPTED = 1, 2, 75, 130
"""EXIT_UNFINISHED (EX_TEMPFAIL of sysexits.h): stopped on request; all work so far is kept, and the same command
continues. It is not 0, so that job systems with retries run the command again."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: those of this process); returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character of a table or a name that the terminal's encoding lacks must not end a command whose work is done.
        sys.stdout.reconfigure(errors="replace")
    try:
        status = _main(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _has_lost_its_reader():
            raise
        return EXIT_ERROR
    return status


def _has_lost_its_reader() -> bool:
    """Whether nobody reads standard output any longer (`| head`). What is left of it is then dropped, so that the interpreter does not
    complain at its end."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not poll.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return True


def _main(arguments: Sequence[str] | None) -> int:
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    if options.version:
        print(importlib.import_module("moleblend_ray").__version__)
        return 0
    if options.job is None:
        print(_overview())
        return 0 if options.help else EXIT_CONFIG
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    is_terminated = threading.Event()
    try:
        if options.help:
            print(job_help(options.job))
            return 0
        with console_logging(verbose=options.verbose):
            wanted = {"dry_run": options.dry_run, "as_json": options.as_json}
            if options.job == SUBMIT:
                return submit_job(options.overrides, verbose=options.verbose, **wanted)
            with _exit_on_sigterm(is_terminated):
                return run_job(options.job, options.overrides, **wanted)
    except MoleBlendError as error:
        # The text of an error from a Ray task contains the remote traceback; its cause is the plain error.
        cause = getattr(error, "cause", None) or error
        _tell(errors, f"moleblend {options.job}", str(cause))
        return EXIT_CONFIG if isinstance(cause, ConfigError) else EXIT_ERROR
    except KeyboardInterrupt:
        _tell(errors, f"moleblend {options.job}", "interrupted; the same command continues")
        return EXIT_INTERRUPTED
    except SystemExit:
        # Its code is no sign: Ray raises another one, with 1, where the signal interrupts a wait for its results.
        if not is_terminated.is_set():
            raise
        _tell(errors, f"moleblend {options.job}", "stopped by SIGTERM; the same command continues")
        return EXIT_UNFINISHED


@contextlib.contextmanager
def _exit_on_sigterm(is_terminated: threading.Event) -> Iterator[None]:
    """SIGTERM sets ``is_terminated`` and ends the body by an exception, so that a cluster that was started is stopped. `pretrain`
    has a handler that commits the current step first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: object) -> None:
        is_terminated.set()
        sys.exit(number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(errors: Console, who: str, what: str) -> None:
    """Print why the command ended, without secrets; as a JSON line if logs are JSON."""
    from moleblend_ray.orchestration.progress import logs

    if line := logs.json_line(logging.ERROR, f"{who}: {what}"):
        print(line, file=sys.stderr)
    else:
        errors.print(f"[bold red]{escape(who)}:[/] {escape(logs.Redactor()(what))}")


def run_job(
    name: str, overrides: Sequence[str], *, dry_run: bool = False, as_json: bool = False
) -> int:
    """Compose and validate the configuration of the job `name`, then print it (`dry_run`) or run it; returns the
    status.

    `as_json`: print the summary as one JSON object to standard output, and everything else to standard error.
    """
    from moleblend_ray.config.compose import load_config
    from moleblend_ray.config.paths import with_absolute_paths
    from moleblend_ray.orchestration.progress.logs import run_name, set_context
    from moleblend_ray.orchestration.progress.terminal import json_text

    job = _job(name)
    overrides = _spelled_out(job, overrides)
    given = load_config(load_reference(job.config), name, overrides)
    config = with_absolute_paths(given)
    if dry_run:
        _print_dry_run(job, config, as_json=as_json)
        return 0
    # Another spelling of --json, for the jobs that have this setting.
    as_json = as_json or getattr(config, "format", "text") == "json"
    set_context(run=run_name(config.out) if getattr(config, "out", None) else None)
    console = Console(highlight=False)
    if job.show is None and not as_json:
        console.print(f"[bold]moleblend {name}[/]", _settings_table(given, config), sep="\n")
    started_s = time.monotonic()
    with _standard_output(free=as_json):
        summary = load_reference(job.function)(config)
    if as_json:
        print(json_text(summary))
    elif job.show is not None:
        console.print(load_reference(job.show)(summary))
    else:
        heading = f"\n[bold]moleblend {name}[/] ended after {time.monotonic() - started_s:.1f} s"
        console.print(heading, _summary_table(summary, config), sep="\n")
    return _exit_status(job, summary)


def _print_dry_run(job: Job, config: Any, *, as_json: bool) -> None:
    from moleblend_ray.config.compose import to_yaml
    from moleblend_ray.config.describe import redact
    from moleblend_ray.orchestration.progress.terminal import json_text
    from moleblend_ray.settings import to_dict

    if as_json:
        print(json_text({"config": to_dict(config), "paths": _paths(config)}))
        return
    print(to_yaml(redact(to_dict(config))).rstrip())
    print(f"# dry run: would call {job.function.replace(':', '.')} ({job.summary})")
    for key, path in _paths(config).items():
        print(f"#   {key}: {path}")
    print("# nothing was read or written")


def _standard_output(*, free: bool) -> contextlib.AbstractContextManager[Any]:
    """With `free`, what the body prints goes to standard error."""
    return contextlib.redirect_stdout(sys.stderr) if free else contextlib.nullcontext()


def _exit_status(job: Job, summary: Any) -> int:
    if job.show is not None:
        return EXIT_ERROR if getattr(summary, "damages", None) else 0
    # What comes next in a script has nothing to work on; warnings have told the reasons.
    if getattr(summary, "all_rejected", False):
        return EXIT_ERROR
    return 0 if getattr(summary, "finished", True) else EXIT_UNFINISHED


def submit_job(
    arguments: Sequence[str], *, dry_run: bool = False, as_json: bool = False, verbose: bool = False
) -> int:
    """Check a job's configuration here, then have a Ray cluster elsewhere run it; returns the exit status of the job.

    The settings of the submission are options; all other arguments, and `verbose`, are for the job. `dry_run`: print
    what would be sent. `as_json`: as in :func:`run_job`, so the log of the job is printed to standard error.
    """
    from moleblend_ray.config.compose import load_config, to_yaml
    from moleblend_ray.config.describe import redact
    from moleblend_ray.config.submit import SubmitConfig, check_job, parse_arguments
    from moleblend_ray.orchestration.progress.terminal import json_text
    from moleblend_ray.settings import build, to_dict

    flags = {f"--{flag}" for job in JOBS.values() for flag in job.flags}
    given = parse_arguments(arguments, flags)
    if verbose:
        given["verbose"] = True
    job_config = None
    if "job" in given:
        job = _job(given["job"])
        given["overrides"] = _spelled_out(job, given.get("overrides", []))
        job_config = load_config(load_reference(job.config), given["job"], given["overrides"])
    config = build(SubmitConfig, given)
    if dry_run:
        settings = None if job_config is None else to_dict(job_config)
        if settings is not None:
            check_job(config, job_config)
        submission = load_reference("moleblend_ray.orchestration.submit:plan")(config)
        if as_json:
            print(json_text({"config": settings, "submission": submission}))
            return 0
        if settings is not None:
            print(to_yaml(redact(settings)).rstrip())
        print("\n".join(submission))
        return 0
    with _standard_output(free=as_json):
        summary = load_reference("moleblend_ray.orchestration.submit:submit")(config, job_config)
    if as_json:
        print(json_text(summary))
    else:
        shown = _summary_table(summary, config)
        Console(highlight=False).print("\n[bold]moleblend submit[/]", shown)
    status: int = summary.exit_status
    return status


def _spelled_out(job: Job, overrides: Sequence[str]) -> list[str]:
    """The overrides in full: a first one without KEY= gets the first key of the job, a flag its value."""
    flags = {f"--{flag}": f"{flag}=true" for flag in job.flags}
    given = [flags.get(text, text) for text in overrides]
    # "~KEY" is hydra's deletion, "~/runs" a path that was quoted for the shell.
    if job.first_key and given and not re.match(r"\+|~[^/]+\Z|[\w./@]+=", given[0]):
        value = given[0]
        if not re.fullmatch(r"[\w./:-]+", value):  # It contains characters with a meaning in hydra.
            value = "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
        given[0] = f"{job.first_key}={value}"
    return given


def job_help(name: str) -> str:
    """Groups and settings of the job `name`, with types, defaults and what they mean."""
    from moleblend_ray.config.compose import group_choices, job_groups
    from moleblend_ray.config.describe import describe

    if name == SUBMIT:
        return _submit_help()
    job = _job(name)
    first = f"{job.first_key.upper()} " if job.first_key else ""
    flags = "".join(f"[--{flag}] " for flag in job.flags)
    lines = [
        f"moleblend {name} {first}[KEY=VALUE ...] {flags}[--json] [--dry-run]",
        "",
        f"  {job.summary}",
        "",
        f"Example: moleblend {name} {job.example}",
        "",
    ]
    groups = job_groups(name)
    if groups:
        lines.append("Groups (GROUP=NAME, a file of conf/GROUP/):")
        for group, default in groups.items():
            choices = ", ".join(group_choices(group)) or "none"
            lines.append(f"  {group}={default or 'null'}  of {choices}")
        lines.append("")
    lines.append("Settings (KEY: type = default):")
    for key in describe(load_reference(job.config)):
        default = "required" if key.default == "required" else f"= {key.default}"
        lines += [f"  {key.path}: {key.type} {default}", f"      {key.doc}"]
    return "\n".join(lines)


def _submit_help() -> str:
    from moleblend_ray.config.submit import options_help

    lines = [
        f"moleblend {SUBMIT} JOB [KEY=VALUE ...] [--address URL] [--detach] [OPTION ...] [--json] [--dry-run]",
        f"moleblend {SUBMIT} --follow ID | --stop ID [--address URL]",
        "",
        "  a job of this machine's command line -> a Ray cluster elsewhere; its log, and its exit status",
        "",
        "KEY=VALUE are the settings of the job (moleblend JOB --help). Options (OPTION: type = default):",
    ]
    return "\n".join([*lines, *options_help()])


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options of the command, the job and its overrides, which include the flags of jobs."""
    if list(arguments[:1]) == [SUBMIT]:
        common = {"--dry-run", "--json", "-v", "--verbose", "-h", "--help"}
        known = _parser().parse_args([SUBMIT, *(text for text in arguments if text in common)])
        known.overrides = [text for text in arguments[1:] if text not in common]
        return known
    flags = {f"--{flag}" for job in JOBS.values() for flag in job.flags}
    parser = _parser()
    mine = [text for text in arguments if text not in flags]
    known, unknown = parser.parse_known_intermixed_args(mine)
    if unknown:
        command = f"moleblend {known.job} --help" if known.job else "moleblend --help"
        # Of Python's versions, some count the value of an unknown option as unknown, others do not.
        options = [text for text in unknown if text.startswith("--")]
        meant = _as_settings(options, mine)
        hint = f" (did you mean {meant}?)" if meant else ""
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}; settings are KEY=VALUE{hint}: {command}"
        )
    known.overrides += [text for text in arguments if text in flags]
    return known


def _as_settings(options: Sequence[str], arguments: Sequence[str]) -> str:
    """Those of ``options`` with a value in ``arguments`` as the settings that they may mean: `--out a --data=b` as "out=a data=b"."""
    pairs = []
    for option in options:
        key, separator, value = option.removeprefix("--").partition("=")
        if not separator:
            value = next(iter(arguments[arguments.index(option) + 1 :]), "")
        if value and not value.startswith("-"):
            pairs.append(f"{key.replace('-', '_')}={value}")
    return " ".join(pairs)


def _parser() -> argparse.ArgumentParser:
    usage = "moleblend JOB [KEY=VALUE ...] [--json] [--dry-run] [--verbose]"
    parser = argparse.ArgumentParser(prog="moleblend", usage=usage, add_help=False)
    parser.add_argument("job", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", action="store_true", dest="as_json")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    return parser


def _overview() -> str:
    width = max(map(len, JOBS))
    jobs = "\n".join(f"  {name:{width}}  {job.summary}" for name, job in JOBS.items())
    way = ("prepare", "pretrain", "finetune", "predict")
    examples = "\n".join(f"  moleblend {name} {JOBS[name].example}" for name in way)
    return f"""moleblend JOB [KEY=VALUE ...] [--json] [--dry-run] [--verbose]

Jobs:
{jobs}

  submit JOB ...         have a Ray cluster elsewhere run the job: moleblend submit --help
  moleblend JOB --help   its settings, types and defaults
  --json                 print the result as one JSON object to standard output, everything else to standard error
  --dry-run              print the resolved settings and what would run; touch nothing
  --verbose              show debug messages
  --version              print the version

From molecules to predictions (moleblend JOB --help has an example of each job):
{examples}

Paths may be local or URIs (s3://bucket/key, gs://, file://).

Exit status: 0 done, 1 failed, 2 wrong settings, 75 stopped by SIGTERM before the end, 130 interrupted. After the
last two the same command continues."""


def _job(name: str) -> Job:
    if name in JOBS:
        return JOBS[name]
    close = difflib.get_close_matches(name, JOBS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"unknown job {name!r}: expected one of {', '.join(JOBS)}{hint}")


def load_reference(reference: str) -> Any:
    """Import and return what "module:name" refers to."""
    module, _, name = reference.partition(":")
    with _no_collections():
        return getattr(importlib.import_module(module), name)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """No search for garbage in the body: imports leave little, and looking through all that they make is a fifth of their time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _paths(config: object) -> dict[str, str]:
    from moleblend_ray.config.describe import redact
    from moleblend_ray.config.paths import path_settings

    return {key: redact(path) for key, path in path_settings(config).items()}


def _settings_table(given: object, config: object) -> Table:
    """The settings that differ from their defaults in ``given``, with their values in ``config``, whose paths are absolute."""
    from moleblend_ray.config.describe import changed_settings, flatten, redact
    from moleblend_ray.settings import to_dict

    table = _table("setting", "value")
    values = flatten(redact(to_dict(config)))
    for key in changed_settings(given):
        table.add_row(escape(key), escape(values[key]))
    return table


def _summary_table(summary: Any, config: object) -> Table:
    from moleblend_ray.config.describe import flatten, redact
    from moleblend_ray.settings import to_dict

    table = _table("what", "result")
    values = to_dict(summary)
    for key, value in flatten(_rounded(redact(values))).items():
        table.add_row(escape(key.replace("_", " ")), "none" if value == "{}" else escape(value))
    table.add_section()
    for key, path in _paths(config).items():
        if key not in values:
            table.add_row(escape(key), escape(path))
    return table


def _rounded(value: Any) -> Any:
    """Floats with six digits for reading; the files of the run hold all digits."""
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [float(f"{item:.6g}") if isinstance(item, float) else item for item in value]
    return f"{value:.6g}" if isinstance(value, float) else value


def _table(left: str, right: str) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column(left, no_wrap=True)
    # Users copy paths from here: a long one is folded, not cut.
    table.add_column(right, overflow="fold")
    return table


@contextlib.contextmanager
def console_logging(*, verbose: bool = False) -> Iterator[None]:
    """Show log records of the package on stderr, above a progress bar if there is one."""
    from moleblend_ray.orchestration.progress.logs import console_formatter

    package_logger = logging.getLogger("moleblend_ray")
    handler = _AboveBar()
    handler.setFormatter(console_formatter())
    before = package_logger.level, package_logger.propagate
    package_logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    package_logger.addHandler(handler)
    package_logger.propagate = False
    try:
        yield
    finally:
        package_logger.removeHandler(handler)
        package_logger.setLevel(before[0])
        package_logger.propagate = before[1]


class _AboveBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
