"""An interrupted search is continued from a whole state of one moment, or begun again: never from half of one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray.tune.search import Searcher, SearchGenerator

from moleblend_ray.evaluation.search import Range, SearchSpace
from moleblend_ray.orchestration.downstream.searchers import build_searcher
from moleblend_ray.orchestration.downstream.sweep import _can_continue

OLD, NEW = "2026-01-01_08-00-00", "2026-01-01_09-00-00"
VARIED = ("patience", "readout")


def trial_state(trial_id: str, **drawn: object) -> str:
    """A trial as Ray Tune 2.60 writes it, as far as it is looked at."""
    return json.dumps({"trial_id": trial_id, "config": {"patience": 3, **drawn}})


def write_state(search: Path, start: str, num_trials: int) -> None:
    """As Ray Tune 2.60 writes it, as far as it is looked at."""
    ids = [f"id-{number}" for number in range(num_trials)]
    state = {"trial_data": [[trial_state(one), "{}"] for one in ids]}
    (search / f"experiment_state-{start}.json").write_text(json.dumps(state))
    searcher = {"_ot_trials": dict.fromkeys(ids)}
    (search / f"searcher-state-{start}.pkl").write_bytes(pickle.dumps(searcher))
    generator = {"counter": num_trials}
    (search / f"search_gen_state-{start}.json").write_bytes(pickle.dumps(generator))


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """A search that one command began and another continued."""
    folder = tmp_path / "search"
    (folder / "trial-0000").mkdir(parents=True)
    (folder / "tuner.pkl").write_bytes(pickle.dumps({"_tune_config": "x"}))
    write_state(folder, OLD, 3)
    write_state(folder, NEW, 4)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def states(search: Path) -> set[str]:
    return {path.stem.split("-", 1)[1] for path in search.glob("experiment_state-*")}


def test_a_search_that_never_began_is_not_continued(tmp_path: Path) -> None:
    assert not _can_continue(str(tmp_path / "search"), VARIED)


def test_a_whole_state_is_continued_and_left_as_it_is(search: Path) -> None:
    assert _can_continue(str(search), VARIED)
    assert states(search) == {OLD, NEW}


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b""), Path.unlink])
@pytest.mark.parametrize("kind", ["experiment_state", "searcher-state", "search_gen_state"])
def test_a_state_that_is_not_whole_gives_way_to_the_one_before(
    search: Path, kind: str, damage: Callable[[Path], None]
) -> None:
    (path,) = search.glob(f"{kind}-{NEW}*")
    damage(path)
    assert _can_continue(str(search), VARIED)
    if kind == "experiment_state" and damage is Path.unlink:
        return  # Tune goes by this file: without it the others are of no state
    assert states(search) == {OLD}


def test_files_of_two_moments_are_no_state(search: Path) -> None:
    newer = search / f"searcher-state-{NEW}.pkl"
    (search / f"searcher-state-{OLD}.pkl").replace(newer)
    assert not _can_continue(str(search), VARIED)
    assert not search.exists()


@pytest.mark.parametrize("lacking", ["settings", "state"])
def test_a_search_without_settings_or_state_begins_again(
    search: Path, lacking: str, caplog: pytest.LogCaptureFixture
) -> None:
    for path in search.glob("*tuner.pkl" if lacking == "settings" else "*state-*"):
        cut(path) if lacking == "settings" else path.unlink()
    assert not _can_continue(str(search), VARIED)
    assert not search.exists()
    assert "begins again" in caplog.text


@pytest.mark.parametrize("name", ["moleblend_ray.of_old Searcher", "ray.tune.search Bayesian"])
@pytest.mark.parametrize("file", ["tuner.pkl", f"searcher-state-{NEW}.pkl"])
def test_a_state_of_classes_that_have_moved_is_not_continued(
    search: Path, file: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    module, of_class = name.split()
    (search / file).write_bytes(f"c{module}\n{of_class}\n.".encode())  # pickle's "global" opcode
    is_settings = file == "tuner.pkl"
    assert _can_continue(str(search), VARIED) != is_settings
    assert not search.exists() if is_settings else states(search) == {OLD}
    assert f"{file} was written by another version: " in caplog.text


def test_a_search_that_draws_what_is_varied_no_more_begins_again(
    search: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = search / f"experiment_state-{NEW}.json"
    state = json.loads(path.read_text())
    state["trial_data"][-1][0] = trial_state("id-3", frozen_blocks=2)
    path.write_text(json.dumps(state))
    assert not _can_continue(str(search), VARIED)
    assert not search.exists()
    assert "earlier version, which varied frozen_blocks there too, and begins again" in caplog.text


class Counting(Searcher):
    """A searcher with a state of its own kind, and no record of its trials."""

    def __init__(self) -> None:
        super().__init__(metric="best_valid_score", mode="max")
        self.drawn = 0

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any]:
        self.drawn += 1
        return {"patience": self.drawn}

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(pickle.dumps(self.drawn))


class Forgetful(Counting):
    """Cannot be stored, as the base class."""

    def save(self, checkpoint_path: str) -> None:
        raise NotImplementedError


def searched(folder: Path, searcher: str, num_trials: int) -> None:
    """The state of a search that made so many trials: searcher and generator in the files of Ray Tune itself."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = build_searcher(
        SearchSpace(searcher=searcher), {"patience": Range(low=1, high=9)}, "max", 0
    )
    generator = SearchGenerator(made)
    ids = [f"id-{number}" for number in range(num_trials)]
    for one in ids:
        made.suggest(one)
    generator._counter = num_trials
    generator.save_to_dir(str(folder), NEW)
    state = {"trial_data": [[trial_state(one), "{}"] for one in ids]}
    (folder / f"experiment_state-{NEW}.json").write_text(json.dumps(state))


@pytest.mark.parametrize("searcher", ["optuna", "random", f"{__name__}.Counting"])
def test_the_state_of_every_searcher_is_continued_if_it_is_of_one_moment(
    tmp_path: Path, searcher: str
) -> None:
    for name, trials_of_later_moment in (("whole", 0), ("mixed", 1)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tuner.pkl").write_bytes(pickle.dumps({"_tune_config": "x"}))
        searched(folder, searcher, 3)
        state = json.loads((folder / f"experiment_state-{NEW}.json").read_text())
        for number in range(trials_of_later_moment):
            state["trial_data"].append([trial_state(f"later-{number}"), "{}"])
        (folder / f"experiment_state-{NEW}.json").write_text(json.dumps(state))
        assert _can_continue(str(folder), VARIED) == (name == "whole")


def test_optuna_s_state_of_as_many_but_other_trials_is_no_state(tmp_path: Path) -> None:
    (tmp_path / "tuner.pkl").write_bytes(pickle.dumps({"_tune_config": "x"}))
    searched(tmp_path, "random", 3)
    path = tmp_path / f"experiment_state-{NEW}.json"
    path.write_text(path.read_text().replace("id-2", "id-7"))
    assert not _can_continue(str(tmp_path), VARIED)


def test_a_search_whose_searcher_stores_nothing_begins_again(tmp_path: Path) -> None:
    (tmp_path / "tuner.pkl").write_bytes(pickle.dumps({"_tune_config": "x"}))
    searched(tmp_path, f"{__name__}.Forgetful", 3)
    assert not _can_continue(str(tmp_path), VARIED)
