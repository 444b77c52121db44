"""Refits without Ray: several tasks of which one fails, and inputs that have changed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moleblend_ray.config.describe import redact
from moleblend_ray.config.downstream import FinetuneConfig, RefitConfig, TaskConfig
from moleblend_ray.config.status import StatusConfig
from moleblend_ray.data.dataset.lease import InUseError
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.claim import PreparedOtherwiseError
from moleblend_ray.errors import ConfigError, DataError, TrainingError
from moleblend_ray.evaluation.results.refit import Choice
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import SplitKind, TaskKind
from moleblend_ray.orchestration.downstream import refit as refit_module
from moleblend_ray.orchestration.downstream.refit import RefitSummary, refit_tasks
from moleblend_ray.orchestration.identity import question
from moleblend_ray.orchestration.status import status
from moleblend_ray.settings import to_dict

SPREAD = {"mean": 1.0, "std": 0.0, "values": [1.0]}


def several(folder: Path, **status: str) -> str:
    """The `out` of a command for several tasks, each in a state."""
    rows = [
        {
            "name": name,
            "status": state,
            "reason": "",
            "results": name if state == "finished" else "",
        }
        for name, state in status.items()
    ]
    storage.write_json(str(folder / "leaderboard.json"), {"tasks": rows})
    for name, state in status.items():
        results = {
            "task": {"name": name, "metric": "rmse", "higher_is_better": False, "unit": ""},
            "data": {"molecules": 9, "split": {"kind": "random", "hash": "0"}},
            "final": {"name": "a model", "valid": SPREAD, "test": SPREAD},
        }
        if state == "finished":
            storage.write_json(str(folder / name / "results.json"), results)
    return str(folder)


def summary_of(config: RefitConfig, *, already_finished: bool = False) -> RefitSummary:
    return RefitSummary(
        out=config.out,
        task=storage.name_of(config.results),
        molecules=9,
        models=2,
        epochs=(3, 4),
        results=config.results,
        seconds=1.0,
        already_finished=already_finished,
    )


def test_a_task_that_fails_stops_no_other_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    results = several(tmp_path / "results", bbbp="failed", esol="finished", herg="finished")
    config = RefitConfig(results=results, out=str(tmp_path / "out"))
    broken, asked = {"esol"}, []

    def refit(own: RefitConfig) -> RefitSummary:
        name = storage.name_of(own.results)
        asked.append(storage.name_of(own.out))
        if name in broken:
            raise DataError("its molecules are gone")
        return summary_of(own)

    monkeypatch.setattr(refit_module, "refit", refit)
    monkeypatch.setattr(refit_module, "ray_session", lambda _: contextlib.nullcontext())
    with pytest.raises(
        TrainingError, match=r"1 of 2 tasks failed: esol: its molecules are gone\. "
    ):
        refit_tasks(config)
    assert asked == ["esol", "herg"]
    assert "bbbp have no results" in caplog.text
    assert not storage.exists(f"{config.out}/refit.json")
    broken.clear()
    found = refit_tasks(config)
    assert (found.tasks, found.models, found.already_finished) == (2, 4, False)
    assert storage.read_json(f"{config.out}/refit.json")["tasks"] == [
        {"name": "esol", "folder": "esol"},
        {"name": "herg", "folder": "herg"},
    ]
    other = several(tmp_path / "other", esol="finished")
    with pytest.raises(ConfigError, match=r"they differ in config\.results"):
        refit_tasks(RefitConfig(results=other, out=config.out))


def test_of_two_commands_for_several_tasks_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = several(tmp_path / "results", esol="finished", herg="finished")
    config = RefitConfig(results=results, out=str(tmp_path / "out"))
    asked, refused = [], []

    def refit(own: RefitConfig) -> RefitSummary:
        asked.append(storage.name_of(own.out))
        # Between the tasks the command works, too.
        assert status(StatusConfig(run=config.out)).state == "running"
        with pytest.raises(InUseError, match="another command works on"):
            refit_tasks(config)
        refused.append(True)
        return summary_of(own)

    monkeypatch.setattr(refit_module, "refit", refit)
    monkeypatch.setattr(refit_module, "ray_session", lambda _: contextlib.nullcontext())
    assert refit_tasks(config).models == 4
    assert (asked, len(refused)) == (["esol", "herg"], 2)


def test_finished_tasks_need_no_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = several(tmp_path / "results", esol="finished", herg="finished")
    config = RefitConfig(results=results, out=str(tmp_path / "out"))
    complete = set()

    def refit(own: RefitConfig) -> RefitSummary:
        complete.add(own.out)
        return summary_of(own, already_finished=own.out in before)

    @contextlib.contextmanager
    def session(_: Any) -> Iterator[None]:
        sessions.append(True)
        yield

    sessions: list[bool] = []
    before: set[str] = set()
    monkeypatch.setattr(refit_module, "refit", refit)
    monkeypatch.setattr(refit_module, "ray_session", session)
    monkeypatch.setattr(Choice, "read", lambda _: None)
    monkeypatch.setattr(refit_module, "_is_finished", lambda _, out: out in before)
    refit_tasks(config)
    before |= complete
    assert refit_tasks(config).already_finished
    assert len(sessions) == 1
    # A task that has results since.
    several(tmp_path / "results", bbbp="finished", esol="finished", herg="finished")
    assert not refit_tasks(config).already_finished
    listed = storage.read_json(f"{config.out}/refit.json")["tasks"]
    assert [task["name"] for task in listed] == ["bbbp", "esol", "herg"]
    assert len(sessions) == 2


def test_what_is_not_of_several_tasks_or_without_results_is_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(ConfigError, match="is not the `out` of several tasks"):
        refit_tasks(RefitConfig(results=str(tmp_path), out=out))
    waiting = several(tmp_path / "results", esol="waiting")
    with pytest.raises(ConfigError, match=r"none of the tasks in .* is finished"):
        refit_tasks(RefitConfig(results=waiting, out=out))
    with pytest.raises(ConfigError, match="out: expected another directory than results"):
        RefitConfig(results=out, out=out)


@pytest.mark.parametrize(
    ("molecules", "weights", "split"),
    [("other", "w", "s"), ("d", "other", "s"), ("d", None, "s"), ("d", "w", "other")],
)
def test_changed_molecules_weights_or_parts_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    molecules: str,
    weights: str | None,
    split: str,
) -> None:
    def load(own: FinetuneConfig, _: Any) -> Any:
        loaded_into.append(own.out)
        return SimpleNamespace(
            molecules=SimpleNamespace(fingerprint=molecules),
            start=SimpleNamespace(fingerprint=weights),
            named=SimpleNamespace(digest=split),
        )

    loaded_into: list[str] = []
    monkeypatch.setattr(refit_module, "load", load)
    monkeypatch.setattr(refit_module, "require_shared_paths", lambda _: None)
    choice = Choice(
        settings=FinetuneSettings(),
        seeds={},
        columns=("y",),
        data_fingerprint="d",
        checkpoint_fingerprint="w",
        config={},
        split_fingerprint="s",
    )
    config = RefitConfig(results=str(tmp_path / "results"), out=str(tmp_path / "out"))
    own = FinetuneConfig(task=TaskConfig(name="esol", source="esol.csv"), out=config.results)
    what = "weights of the checkpoint" if molecules == "d" else "molecules"
    what = what if split == "s" else "parts of the molecules"
    with pytest.raises(DataError, match=rf"the {what} have changed since \S+/results was made"):
        refit_module._load(config, choice, own, None)  # type: ignore[arg-type]
    # Results are only read: molecules that are prepared again are not written there.
    assert loaded_into == [config.out]


def results_from(folder: Path, source: str, **settings: Any) -> tuple[RefitConfig, Choice]:
    """A refit of results whose command read ``source``, and what it reads of them."""
    task = TaskConfig(
        name="mine",
        source=source,
        columns=("y",),
        kind=TaskKind.REGRESSION,
        smiles_column="structure",
        **settings,
    )
    config = redact(to_dict(FinetuneConfig(task=task, out=str(folder / "results"))))
    choice = Choice(
        settings=FinetuneSettings(),
        seeds={},
        columns=("y",),
        data_fingerprint="d",
        checkpoint_fingerprint=None,
        config=config,
    )
    return RefitConfig(results=str(folder / "results"), out=str(folder / "out")), choice


def test_prepared_molecules_take_the_place_of_a_source_with_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = "https://bucket.example/assay.csv?X-Amz-Signature=secret"
    config, choice = results_from(tmp_path, link)
    with pytest.raises(ConfigError, match=r"task\.source, https\S+=\*\*\*, cannot be read again"):
        refit_module._own_settings(config, choice)
    monkeypatch.setattr(refit_module, "is_prepared", lambda _: True)
    task = refit_module._own_settings(config, choice).task
    assert (task.source, task.smiles_column) == (f"{config.results}/data", "smiles")
    plain, choice = results_from(tmp_path, str(tmp_path / "assay.csv"))
    task = refit_module._own_settings(plain, choice).task
    assert (task.source, task.smiles_column) == (str(tmp_path / "assay.csv"), "structure")
    # The column is in the file alone.
    config, choice = results_from(tmp_path, link, split_column="date", split=SplitKind.TIME)
    with pytest.raises(ConfigError, match=r"task\.source, https"):
        refit_module._own_settings(config, choice)


def test_a_checkpoint_whose_credentials_results_hide_is_named(tmp_path: Path) -> None:
    config, choice = results_from(tmp_path, "assay.csv")
    changed = {**choice.config, "checkpoint": "https://***@host.example/encoder"}
    with pytest.raises(
        ConfigError, match=r"checkpoint, https://\*\*\*@host\.example/encoder, cannot"
    ):
        refit_module._own_settings(config, dataclasses.replace(choice, config=changed))


def test_an_out_of_other_results_is_refused_by_these_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, choice = results_from(tmp_path, "assay.csv")
    monkeypatch.setattr(Choice, "read", lambda _: choice)
    panel = dataclasses.replace(config, results=str(tmp_path / "panel"))
    storage.write_json(f"{config.out}/config.json", {"config": question(panel)})
    storage.write_json(f"{config.out}/refit.json", {"tasks": []})
    with pytest.raises(
        ConfigError, match=r"differ in config\.results: '\S+' there, '\S+' here\. Give"
    ):
        refit_module.refit(config)


def test_a_source_that_has_changed_is_named_and_no_results_are_to_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, choice = results_from(tmp_path, "assay.csv")

    def load(own: FinetuneConfig, _: Any) -> None:
        raise PreparedOtherwiseError(f"delete {own.out}/data", "sources: there 9 bytes; now 10")

    monkeypatch.setattr(refit_module, "load", load)
    monkeypatch.setattr(refit_module, "require_shared_paths", lambda _: None)
    own = FinetuneConfig(task=TaskConfig(name="esol", source="esol.csv"), out=config.results)
    with pytest.raises(
        DataError, match=r"sources: there 9 bytes; now 10\. Bring them back, or"
    ) as e:
        refit_module._load(config, choice, own, None)  # type: ignore[arg-type]
    assert "delete" not in str(e.value)


def test_a_source_that_is_gone_is_told_to_be_that_of_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, choice = results_from(tmp_path, str(tmp_path / "assay.csv"))
    monkeypatch.setattr(Choice, "read", lambda _: choice)
    with pytest.raises(
        DataError, match=r"what \S+/results was made of is not in its place.*assay\.csv"
    ):
        refit_module.refit(config)
