"""Nothing is written into a directory that holds what another command has made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.data import storage
from moleblend_ray.errors import ConfigError
from moleblend_ray.orchestration.identity import check_claim, require_own
from moleblend_ray.orchestration.prepare import prepare
from moleblend_ray.orchestration.run_folder import open_run

from .test_run_identity import CONFIG, whole

COMMANDS = ("prepare", "pretrain", "finetune", "sweep", "embed", "predict")
NOTES = {
    "pretrain": {"config": {"order": {}, "model": {}}},
    **{
        name: {"config": {"job": f"{name.title()}Config"}}
        for name in ("finetune", "sweep", "embed", "predict")
    },
}


def write_note(out: Path, command: str) -> None:
    storage.write_json(str(out / "config.json"), NOTES[command])


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("made_by", NOTES)
def test_only_the_command_that_made_the_results_goes_on(
    tmp_path: Path, made_by: str, command: str
) -> None:
    write_note(tmp_path, made_by)
    if command == made_by:
        require_own(str(tmp_path), command)
        return
    told = rf"^out: .* holds results of `moleblend {made_by}`\. Give .* for `moleblend {command}`$"
    with pytest.raises(ConfigError, match=told):
        require_own(str(tmp_path), command)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "file", ["manifest.json", "receipts/plan.json", "leaderboard.json"], ids=lambda file: file
)
def test_data_sets_and_results_of_several_tasks_are_known_by_their_files(
    tmp_path: Path, file: str, command: str
) -> None:
    storage.write_json(str(tmp_path / file), {})
    if command == "prepare" and file != "leaderboard.json":
        require_own(str(tmp_path), command)
        return
    what = "results of several" if file == "leaderboard.json" else "data set of `moleblend prepare`"
    with pytest.raises(ConfigError, match=rf"holds .*{what}.* for `moleblend {command}`$"):
        require_own(str(tmp_path), command)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_directory_and_one_with_a_torn_note_are_free(tmp_path: Path, command: str) -> None:
    require_own(str(tmp_path), command)
    (tmp_path / "config.json").write_text('{"conf')
    require_own(str(tmp_path), command)


def test_a_prepared_data_set_stays_as_it_is_when_it_is_named_as_the_out_of_others(
    tmp_path: Path,
) -> None:
    storage.write_json(str(tmp_path / "manifest.json"), {"a": 1})
    runs: tuple[Callable[[], object], ...] = (
        lambda: open_run(dataclasses.replace(CONFIG, out=str(tmp_path)), whole()),
        lambda: check_claim(str(tmp_path), {"config": {"job": "EmbedConfig"}}),
    )
    for run in runs:
        with pytest.raises(ConfigError, match="holds a data set of `moleblend prepare`"):
            run()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_prepare_refuses_the_folder_of_a_run(tmp_path: Path) -> None:
    source = tmp_path / "molecules.smi"
    source.write_text("CCO\n")
    out = tmp_path / "run"
    write_note(out, "pretrain")
    with pytest.raises(ConfigError, match=r"results of `moleblend pretrain`\. .*moleblend prepare"):
        prepare(PrepareConfig(source=str(source), out=str(out)))
    assert [path.name for path in out.iterdir()] == ["config.json"]
