"""Nothing is written into a directory that holds what another command has made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.data.files import storage
from moleblend_ray.errors import ConfigError
from moleblend_ray.orchestration.identity import check_claim, check_finished, claim, require_own
from moleblend_ray.orchestration.preparation.prepare import prepare
from moleblend_ray.orchestration.pretraining.run_folder import open_run

from .pretraining.test_run_identity import CONFIG, whole

COMMANDS = ("prepare", "pretrain", "finetune", "sweep", "embed", "predict", "export")
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


def noted(seeds: list[int], kinds: list[str], **others: object) -> dict[str, object]:
    config = {"job": "FinetuneConfig", "seeds": seeds, "baseline": {"kinds": kinds}, **others}
    return {"config": config, "data_fingerprint": "aaa"}


def test_seeds_and_baselines_are_added_to_the_note_and_nothing_else_is(tmp_path: Path) -> None:
    out, note = str(tmp_path), tmp_path / "config.json"
    claim(out, noted([1, 0], ["forest"], split_seed=0))
    for seeds, kinds in (([1, 0, 2], ["forest"]), ([1, 0, 2], ["boosting", "forest"])):
        asked = noted(seeds, kinds, split_seed=0)
        check_claim(out, {"config": asked["config"]})
        claim(out, asked)
        storage.write_json(str(tmp_path / "models/seed-1/result.json"), {})
        assert storage.read_json(str(note)) == asked
    before = note.read_bytes()
    for other, named in (
        (noted([1, 0], ["boosting", "forest"], split_seed=0), "config.seeds"),
        # Settings of baselines were chosen with the first seed.
        (noted([0, 1, 2], ["boosting", "forest"], split_seed=0), "config.seeds"),
        (noted([1, 0, 2], ["boosting"], split_seed=0), r"config\.baseline\.kinds"),
        (noted([1, 0, 2, 3], ["boosting", "forest"], split_seed=1), r"config\.split_seed"),
        ({**asked, "data_fingerprint": "bbb"}, "data_fingerprint"),
        (noted([1, 0, 2], 7, split_seed=0), r"config\.baseline\.kinds"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ConfigError, match=f"they differ in {named}: [^;]*$"):
            claim(out, other)
        assert note.read_bytes() == before


def test_an_addition_that_did_not_end_can_be_given_up_or_be_another_one(tmp_path: Path) -> None:
    out, note = str(tmp_path), tmp_path / "config.json"
    finished = noted([0], ["forest"], split_seed=0)
    storage.write_json(str(tmp_path / "results.json"), {"config": finished["config"]})
    storage.write_json(str(tmp_path / "models/seed-0/result.json"), {})
    claim(out, noted([0, 11], ["forest", "boosting"], split_seed=0))
    check_finished(out, finished["config"], dict)  # type: ignore[arg-type]
    for seeds, kinds in (([0, 1], ["forest"]), ([0], ["descriptors", "forest"])):
        asked = noted(seeds, kinds, split_seed=0)
        check_claim(out, {"config": asked["config"]})
        claim(out, asked)
        assert storage.read_json(str(note)) == asked
    for seeds, kinds in (([1, 0], ["forest"]), ([0], ["boosting"])):
        with pytest.raises(ConfigError, match="Further seeds are added after those that are there"):
            claim(out, noted(seeds, kinds, split_seed=0))
    with pytest.raises(ConfigError, match=r"as they were$"):
        claim(out, noted([0, 1], ["forest"], split_seed=1))


def test_the_order_of_baselines_makes_no_other_question(tmp_path: Path) -> None:
    claim(str(tmp_path), noted([0], ["forest", "descriptors"]))
    storage.write_json(str(tmp_path / "models/seed-0/result.json"), {})
    asked = noted([0], ["descriptors", "forest"])
    check_finished(str(tmp_path), asked["config"], dict)  # type: ignore[arg-type]


def test_notes_of_folds_alone_are_no_results(tmp_path: Path) -> None:
    claim(str(tmp_path), noted([0], [], finetune={"learning_rate": 1.0}))
    claim(str(tmp_path / "folds/fold-0"), noted([0], [], finetune={"learning_rate": 1.0}))
    other = noted([0], [], finetune={"learning_rate": 0.1})
    claim(str(tmp_path), other)
    claim(str(tmp_path / "folds/fold-0"), other)
    storage.write_json(str(tmp_path / "folds/fold-1/models/seed-0/result.json"), {})
    with pytest.raises(ConfigError, match=r"they differ in config\.finetune\.learning_rate"):
        claim(str(tmp_path), noted([0], [], finetune={"learning_rate": 0.2}))
