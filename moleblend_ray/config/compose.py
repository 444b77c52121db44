"""Hydra composes plain YAML and the command line's overrides; the strict builder takes it from there.

YAML holds differences only. A value override (`order.seed=3`) may therefore name a key that no file mentions:
hydra is told to add it, and the builder refuses it if the job has no such setting.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moleblend_ray.data.files.download import Collection
from moleblend_ray.errors import ConfigError
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.settings import build

T = TypeVar("T")

ModelPreset = Literal["tiny", "mini", "small", "base", "large", "xl"]

COMMAND_LINE = "the command line"


def config_dir() -> Path:
    """The folder of YAML files: inside an installed wheel, else beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"no conf/ folder in {package} or {package.parent}: reinstall moleblend-ray")


def compose(job: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain mapping of conf/`job`.yaml with its groups (model=tiny) and overrides (order.seed=3) applied."""
    groups = job_groups(job)
    prepared = [_prepare_override(job, override, groups) for override in overrides]
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            composed = hydra_compose(config_name=job, overrides=prepared)
            values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{job}: {_unreadable(prepared) or _first_lines(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{job}: expected a mapping in conf/{job}.yaml")
    return {str(key): value for key, value in values.items()}


def load_config(cls: type[T], job: str, overrides: Sequence[str] = ()) -> T:
    """The configuration of `job` as the dataclass `cls`; errors name the file that set the value."""
    return build(
        cls,
        compose(job, overrides),
        origin=lambda path: _origin(job, overrides, path),
        choices=group_choices,
    )


def model_preset(name: ModelPreset) -> ModelConfig:
    """The model of conf/model/`name`.yaml."""
    _check_choice("model", name)
    return build(ModelConfig, _read_yaml(config_dir() / "model" / f"{name}.yaml"))


def collection_preset(name: str) -> Collection:
    """The published collection of conf/collection/`name`.yaml."""
    _check_choice("collection", name)
    return build(Collection, _read_yaml(config_dir() / "collection" / f"{name}.yaml"))


def to_yaml(values: Mapping[str, Any]) -> str:
    """`values` as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(values)))


def job_groups(job: str) -> dict[str, str | None]:
    """The groups that `job` may choose from, each with its default choice: {"model": "base", ...}."""
    path = config_dir() / f"{job}.yaml"
    if not path.is_file():
        jobs = sorted(file.stem for file in config_dir().glob("*.yaml"))
        raise ConfigError(f"unknown job {job!r}: expected one of {', '.join(jobs)}")
    defaults = _read_yaml(path).get("defaults", [])
    groups: dict[str, str | None] = {}
    for entry in defaults:
        if isinstance(entry, Mapping):
            groups.update(
                {str(name).removeprefix("override "): choice for name, choice in entry.items()}
            )
    return groups


def group_choices(group: str) -> list[str]:
    """The names that `group`=NAME accepts."""
    folder = config_dir() / group
    return sorted(
        file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")
    )


def _prepare_override(job: str, override: str, groups: Mapping[str, str | None]) -> str:
    """`override` in hydra's grammar: group choices as they are, values as additions, odd strings quoted."""
    key, equals, value = override.partition("=")
    if not equals:
        if key.startswith("~") and "/" not in key:  # hydra's deletion, no path
            return override
        raise ConfigError(
            f"override {override!r}: expected KEY=VALUE; moleblend {job} --help lists the keys"
        )
    # hydra's "+" for what no file mentions: here never needed and always allowed.
    key = key.lstrip("+")
    if key in groups:
        _check_choice(key, value)
        return f"{key}={value}"
    if (config_dir() / key).is_dir():
        chosen = ", ".join(sorted(groups)) or "none"
        raise ConfigError(f"{override}: {job} has no group {key!r}; its groups: {chosen}")
    if value.startswith(("[", "{", "'", '"')) or _is_one_value(f"++{key}={value}"):
        return f"++{key}={value}"
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"++{key}='{escaped}'"


def _check_choice(group: str, value: str) -> None:
    choices = group_choices(group)
    if value in choices or value == "null":
        return
    close = difflib.get_close_matches(value, choices, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ConfigError(f"{group}={value}: expected one of {', '.join(choices)}{hint}")


def _is_one_value(override: str) -> bool:
    """Whether hydra reads `override` as one value: no syntax error, and no sweep over choices."""
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return not parsed.is_sweep_override()


def _origin(job: str, overrides: Sequence[str], path: str) -> str | None:
    """Where the value at `path` was written last: the command line, a group's file, or the job's own."""
    chosen = _chosen(overrides)
    for override in overrides:
        key = override.partition("=")[0].lstrip("+")
        if key in chosen:
            continue
        if path == key or path.startswith((f"{key}.", f"{key}[")):
            return COMMAND_LINE
    choices = {**job_groups(job), **chosen}
    files = [(f"{group}/{choice}", group) for group, choice in choices.items() if choice]
    for name, group in [*reversed(files), (job, "")]:
        file = config_dir() / f"{name}.yaml"
        if not file.is_file():
            continue
        package = "" if "@package _global_" in file.read_text() else group.replace("/", ".")
        if path in _paths(_read_yaml(file), package):
            return f"conf/{name}.yaml"
    return None


def _chosen(overrides: Sequence[str]) -> dict[str, str]:
    pairs = [override.lstrip("+").partition("=") for override in overrides]
    return {key: value for key, _, value in pairs if (config_dir() / key).is_dir()}


def _paths(values: Any, prefix: str) -> Iterator[str]:
    yield prefix
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _paths(value, f"{prefix}.{key}" if prefix else str(key))


def _read_yaml(file: Path) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(file))
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _unreadable(overrides: Sequence[str]) -> str | None:
    """Why the first override that hydra's grammar does not take cannot be read; None if it takes all."""
    parser = OverridesParser.create()
    for override in overrides:
        try:
            parser.parse_override(override)
        except HydraException:
            return (
                f"{override.lstrip('+')} cannot be read: a bracket, brace or quote is missing, or it needs quotes (lists are KEY=[a,b], "
                'names with brackets or other signs KEY=["a (b)"], all in single quotes for the shell)'
            )
    return None


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:3])
