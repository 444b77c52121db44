"""How a job is handed to a Ray cluster elsewhere.

The command line of `moleblend submit` is that of the job itself, KEY=VALUE, with the submission's own settings as options:

    moleblend submit pretrain data=s3://b/data out=s3://b/run cluster=kuberay --address http://127.0.0.1:8265 --detach

So a command that works here runs on the cluster with `submit` before it, and settings of the job and of its submission
cannot be confused.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

from moleblend_ray.checks import at_least, check_all
from moleblend_ray.config.describe import describe, redact
from moleblend_ray.config.paths import path_settings
from moleblend_ray.errors import SECRET_NAME, ConfigError, without_credentials
from moleblend_ray.settings import field_types, typed

_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SCRATCH: Final = ("dir", "spool")
"""Paths that each machine may have for itself: what lies there is copied to where it belongs, or is of no use to others."""
_NOT_OPTIONS: Final = ("job", "overrides")


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitConfig:
    """A job -> the Ray cluster at an address."""

    job: str | None = None
    """The job to run there; null with `follow` or `stop`."""
    overrides: tuple[str, ...] = ()
    """Its own KEY=VALUE arguments."""
    address: str | None = None
    """URL of the cluster's dashboard (http://127.0.0.1:8265 through a port forward, or https://); null: that of
    RAY_API_SERVER_ADDRESS, else RAY_ADDRESS."""
    detach: bool = False
    """Do not wait for the job: print its id, and how to follow and stop it."""
    follow: str | None = None
    """Id of a submitted job: show its log from the beginning, and end as it ends, instead of submitting one."""
    stop: str | None = None
    """Id of a submitted job: ask it to commit where it is and end, instead of submitting one."""
    code: Literal["package", "image"] = "package"
    """"package" sends the sources of this installation along, about 2 MB; "image" uses what the nodes have installed."""
    env: tuple[str, ...] = ()
    """Environment variables of the job: NAME (its value here) or NAME=VALUE. They can be read in the dashboard: secrets are
    refused, and come from the nodes (a Kubernetes Secret)."""
    stop_wait_s: int = 120
    """Seconds that the job has between a stop and its end by force: time for a checkpoint."""
    verbose: bool = False
    """Show debug messages, those of the job in its log as well; -v for short."""
    allow_local_paths: bool = False
    """Let inputs and outputs be plain local paths, written whole: the cluster is this machine, or mounts the same folders."""

    def __post_init__(self) -> None:
        asked = [name for name in ("job", "follow", "stop") if getattr(self, name)]
        check_all(
            (
                len(asked) == 1,
                f"job: expected a job to submit, or follow=ID, or stop=ID, found {' and '.join(asked) or 'none'}",
            ),
            (not self.overrides or bool(self.job), "overrides: there is no job that they are for"),
            (
                self.address is None or re.match(r"https?://[^/]", self.address) is not None,
                f"address: expected http://HOST:8265 or https://HOST, found {self.address!r}. It is the address of the "
                "dashboard, not the one that Ray's own processes use",
            ),
            *at_least(self, 1, "stop_wait_s"),
            *((_env_problem(text) == "", _env_problem(text)) for text in self.env),
        )


def _env_problem(text: str) -> str:
    """What is wrong with an entry of ``env``; its value, which may be a secret, is not shown."""
    name, _, value = text.partition("=")
    if not _ENV_NAME.fullmatch(name):
        return f"env: expected NAME or NAME=VALUE, found {without_credentials(name)!r}"
    if SECRET_NAME.search(name) or without_credentials(value) != value:
        return (
            f"env: {name} looks like a secret, and what is sent with a job can be read in the dashboard. Set it on the nodes "
            "of the cluster (Kubernetes: a Secret and `envFrom`)"
        )
    return ""


def parse_arguments(arguments: Sequence[str], job_flags: Collection[str] = ()) -> dict[str, Any]:
    """Settings of :class:`SubmitConfig` as the command line of `moleblend submit` gives them, in any order.

    ``job_flags``: options that are the job's. A ConfigError for one that is nobody's, or has no value or a wrong one.
    """
    parser = _Parser(prog="moleblend submit", add_help=False, allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    for option, (name, annotation) in _options().items():
        if annotation is bool:
            parser.add_argument(option, dest=name, action="store_true", default=None)
        elif typing.get_origin(annotation) is tuple:
            parser.add_argument(option, dest=name, action="append")
        else:
            parser.add_argument(option, dest=name, type=int if annotation is int else str)
    mine = [text for text in arguments if text not in job_flags]
    values = vars(parser.parse_intermixed_args(mine))
    words = values.pop("words")
    given = {name: value for name, value in values.items() if value is not None}
    if words and "=" not in words[0]:
        given["job"] = words.pop(0)
    words += [text for text in arguments if text in job_flags]
    return {**given, **({"overrides": words} if words else {})}


def options_help() -> list[str]:
    """Two lines for each option."""
    docs = {key.path: key for key in describe(SubmitConfig)}
    lines = []
    for option, (name, _) in _options().items():
        lines += [
            f"  {option}: {docs[name].type} = {docs[name].default}",
            f"      {docs[name].doc}",
        ]
    return lines


def _options() -> dict[str, tuple[str, Any]]:
    """Option -> name and type of its setting."""
    return {
        f"--{name.replace('_', '-')}": (name, annotation)
        for name, annotation in field_types(SubmitConfig).items()
        if name not in _NOT_OPTIONS
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        found = re.fullmatch(r"unrecognized arguments: (--[\w-]+).*", message)
        close = difflib.get_close_matches(found[1], _options(), n=1) if found else []
        raise ConfigError(message + (f"; did you mean {close[0]}?" if close else ""))


def environment(config: SubmitConfig, here: Mapping[str, str]) -> dict[str, str]:
    """The job's environment variables, values of bare names from those ``here``; a ConfigError for one that is not there."""
    found = {}
    for text in config.env:
        name, equals, value = text.partition("=")
        if not equals:
            if name not in here:
                raise ConfigError(f"env: {name} is not set here: set it, or write {name}=VALUE")
            value = here[name]
            if without_credentials(value) != value:
                raise ConfigError(_env_problem(f"{name}={value}"))
        found[name] = value
    return found


def _hidden(override: str) -> str:
    """KEY=VALUE with whatever is secret in it hidden."""
    key, equals, value = override.partition("=")
    return f"{key}{equals}{redact(value, key)}"


def check_job(config: SubmitConfig, job_config: object) -> None:
    """Refuse what would fail on the cluster, or be read by others there: all problems in one ConfigError."""
    problems: list[str] = []
    paths = {
        key: path
        for key, path in path_settings(job_config).items()
        if "://" not in path and key.rpartition(".")[2] not in _SCRATCH
    }
    if not config.allow_local_paths:
        problems += [
            f"{key}={without_credentials(path)}: a path of this machine, which the cluster does not see. Copy it to storage that all "
            "nodes reach (s3://, gs://), or write file:///PATH for a folder mounted on all of them"
            for key, path in paths.items()
        ]
    else:
        problems += [
            f"{key}={without_credentials(path)}: a job begins in a folder of its own, which is deleted after it. Write the whole path: "
            f"{without_credentials(os.path.abspath(os.path.expanduser(path)))}"
            for key, path in paths.items()
            if not os.path.isabs(path)
        ]
    problems += [
        f"{_hidden(text)}: holds a secret, and a job's command can be read in the dashboard. Give the nodes access instead "
        "(a Secret and `envFrom`, or an identity of the workload)"
        for text in config.overrides
        if _hidden(text) != text
    ]
    cluster = getattr(job_config, "cluster", None)
    address = getattr(cluster, "address", None)
    if address not in (None, "auto"):
        problems.append(
            f"cluster.address={address}: a submitted job runs on the cluster that it was submitted to. Leave it out; the address of "
            "the submission is --address"
        )
    if problems:
        raise ConfigError("\n".join(problems))


def losses(job_config: Any) -> list[str]:
    """What the job will write where nobody finds it afterwards, in words."""
    tracking = getattr(job_config, "tracking", None)
    if tracking is None or tracking.mode != "offline" or os.path.isabs(tracking.dir):
        return []
    return [
        f"tracking.dir={tracking.dir}: the offline files of wandb lie in the job's own folder on a node, which Ray deletes after the "
        "job. Set tracking.mode=disabled (the same numbers are in metrics/ of the run), or a whole path that is kept"
    ]
