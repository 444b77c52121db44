"""What a sweep may vary: ranges and choices of every kind of setting, and what is refused before it starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moleblend_ray.errors import ConfigError
from moleblend_ray.evaluation.search import (
    Choice,
    Range,
    SearchSpace,
    plain_values,
    with_drawn,
)
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.settings import build, to_dict

EPOCHS = (40, 100)


def test_by_default_the_published_ranges_are_varied_with_the_task_s_epochs() -> None:
    assert SearchSpace().dimensions(EPOCHS) == {
        "learning_rate": Range(low=1e-6, high=1e-4, is_log=True),
        "weight_decay": Range(low=1e-7, high=1e-3, is_log=True),
        "batch_size": Choice(values=(32, 64, 128, 256)),
        "epochs": Range(low=40, high=100, is_integer=True),
    }


def test_what_is_null_is_not_varied_and_own_epochs_count_more() -> None:
    space = SearchSpace(learning_rate=None, weight_decay=None, batch_size=None, epochs=(1, 3))
    assert space.dimensions(EPOCHS) == {"epochs": Range(low=1, high=3, is_integer=True)}


def test_added_ranges_take_kind_and_scale_from_setting_and_limits() -> None:
    space = SearchSpace(
        ranges={
            "layer_decay": (0.5, 1.0),
            "head_dropout": (0.0, 0.3),
            "patience": (2.0, 8.0),
            "micro_batch_size": (1.0, 128.0),
            "head_learning_rate": (1e-5, 1e-3),
        }
    )
    found = space.dimensions(EPOCHS)
    assert list(found)[4:] == list(space.ranges)
    assert found["layer_decay"] == Range(low=0.5, high=1.0)
    assert found["head_dropout"] == Range(low=0.0, high=0.3)
    assert found["patience"] == Range(low=2, high=8, is_integer=True)
    assert found["micro_batch_size"] == Range(low=1, high=128, is_integer=True, is_log=True)
    assert found["head_learning_rate"] == Range(low=1e-5, high=1e-3, is_log=True)


def test_choices_of_every_kind_become_plain_values_and_settings_again() -> None:
    space = SearchSpace(
        choices={
            "readout": ("token", "mean"),
            "atom_reference": (True, False),
            "frozen_blocks": (None, 0, 2),
            "clip_norm": (1, 5),
        }
    )
    found = space.dimensions(EPOCHS)
    assert found["clip_norm"] == Choice(values=(1.0, 5.0))
    assert found["frozen_blocks"] == Choice(values=(None, 0, 2))
    for name in space.choices:
        dimension = found[name]
        assert isinstance(dimension, Choice)
        for value in dimension.values:
            assert getattr(with_drawn(FinetuneSettings(), {name: value}), name) == value


def test_a_space_without_some_settings_draws_the_others_alike() -> None:
    points = [{"learning_rate": 1e-5, "frozen_blocks": 2}]
    space = SearchSpace(
        ranges={"layer_decay": (0.5, 1.0)},
        choices={"frozen_blocks": (2, 4), "readout": ("token", "mean")},
        searcher_options={"points_to_evaluate": points},
    )
    found = space.without(["frozen_blocks", "fresh_blocks"])
    expected = space.dimensions(EPOCHS)
    del expected["frozen_blocks"]
    assert found.dimensions(EPOCHS) == expected
    assert found.searcher_options == {"points_to_evaluate": [{"learning_rate": 1e-5}]}
    assert points == [{"learning_rate": 1e-5, "frozen_blocks": 2}]


def test_a_space_is_read_from_a_plain_configuration_and_written_back() -> None:
    values = {
        "ranges": {"layer_decay": [0.5, 1], "patience": [2, 8]},
        "choices": {"readout": ["token", "mean"], "frozen_blocks": [None, 1]},
        "searcher": "random",
        "scheduler": "ray.tune.schedulers.HyperBandScheduler",
        "scheduler_options": {"max_t": 9},
    }
    space = build(SearchSpace, values)
    assert space.ranges == {"layer_decay": (0.5, 1.0), "patience": (2.0, 8.0)}
    assert space.choices["frozen_blocks"] == (None, 1)
    assert build(SearchSpace, to_dict(space)) == space


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"ranges": {"dropout": (0.0, 0.1)}}, "ranges: dropout is no setting of finetune"),
        ({"ranges": {"epochs": (1.0, 2.0)}}, "ranges: epochs has a setting of its own"),
        ({"ranges": {"readout": (0.0, 1.0)}}, "ranges: readout is no number"),
        ({"ranges": {"atom_reference": (0.0, 1.0)}}, "ranges: atom_reference is no number"),
        ({"ranges": {"head_dropout": (0.3, 0.1)}}, "head_dropout: expected lowest <= highest"),
        ({"ranges": {"head_dropout": (0.3, 1.1)}}, "ranges: head_dropout: expected .*1.1"),
        ({"ranges": {"patience": (1.5, 3.0)}}, "patience: expected int, found 1.5"),
        ({"choices": {"readout": ("token", "max")}}, "readout: expected one of token,.*'max'"),
        ({"choices": {"readout": ("token", "token")}}, "readout: expected distinct values"),
        ({"choices": {"readout": ()}}, "readout: expected distinct values, found \\[\\]"),
        ({"choices": {"patience": ("few",)}}, "patience: expected int, found 'few'"),
        ({"choices": {"patience": (0, 3)}}, "choices: patience: expected at least 1, found 0"),
        (
            {"choices": {"patience": (2, 3)}, "ranges": {"patience": (2.0, 3.0)}},
            "choices: patience is in ranges too",
        ),
        ({"searcher": "tpe"}, "searcher: expected optuna, random"),
        ({"scheduler": "fifo"}, "scheduler: expected asha, median, none"),
        ({"batch_size": ()}, "batch_size: expected values >= 1"),
        ({"learning_rate": (0.0, 1.0)}, "learning_rate: expected 0 < lowest"),
    ],
)
def test_a_space_that_no_setting_can_take_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        SearchSpace(**change)


def test_numbers_of_numpy_become_plain_ones_of_the_setting_s_type() -> None:
    drawn = {"batch_size": np.int64(64), "epochs": np.float64(7.0), "learning_rate": np.float32(1)}
    values = plain_values(drawn)
    assert values == {"batch_size": 64, "epochs": 7, "learning_rate": 1.0}
    assert [type(value) for value in values.values()] == [int, int, float]
    settings = with_drawn(FinetuneSettings(patience=3), drawn)
    assert (settings.batch_size, settings.epochs, settings.patience) == (64, 7, 3)
