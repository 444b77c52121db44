"""An interrupted search is continued from a whole state of one moment, or begun again: never from half of one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from moleblend_ray.orchestration.sweep import _can_continue

OLD, NEW = "2026-01-01_08-00-00", "2026-01-01_09-00-00"


def write_state(search: Path, start: str, num_trials: int) -> None:
    """As Ray Tune 2.60 writes it, as far as it is looked at."""
    ids = [f"id-{number}" for number in range(num_trials)]
    state = {"trial_data": [[json.dumps({"trial_id": one}), "{}"] for one in ids]}
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
    assert not _can_continue(str(tmp_path / "search"))


def test_a_whole_state_is_continued_and_left_as_it_is(search: Path) -> None:
    assert _can_continue(str(search))
    assert states(search) == {OLD, NEW}


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b""), Path.unlink])
@pytest.mark.parametrize("kind", ["experiment_state", "searcher-state", "search_gen_state"])
def test_a_state_that_is_not_whole_gives_way_to_the_one_before(
    search: Path, kind: str, damage: Callable[[Path], None]
) -> None:
    (path,) = search.glob(f"{kind}-{NEW}*")
    damage(path)
    assert _can_continue(str(search))
    if kind == "experiment_state" and damage is Path.unlink:
        return  # Tune goes by this file: without it the others are of no state
    assert states(search) == {OLD}


def test_files_of_two_moments_are_no_state(search: Path) -> None:
    newer = search / f"searcher-state-{NEW}.pkl"
    (search / f"searcher-state-{OLD}.pkl").replace(newer)
    assert not _can_continue(str(search))
    assert not search.exists()


@pytest.mark.parametrize("lacking", ["settings", "state"])
def test_a_search_without_settings_or_state_begins_again(
    search: Path, lacking: str, caplog: pytest.LogCaptureFixture
) -> None:
    for path in search.glob("*tuner.pkl" if lacking == "settings" else "*state-*"):
        cut(path) if lacking == "settings" else path.unlink()
    assert not _can_continue(str(search))
    assert not search.exists()
    assert "begins again" in caplog.text
