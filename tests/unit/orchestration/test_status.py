"""`moleblend status` of every kind of directory, without Ray, as tables and as JSON."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moleblend_ray.config.compose import load_config
from moleblend_ray.config.status import StatusConfig
from moleblend_ray.data.dataset.dataset_files import MANIFEST_NAME, part_name
from moleblend_ray.data.dataset.lease import leased
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.receipts import Receipt, Statistics
from moleblend_ray.errors import ConfigError, DataError, MoleBlendError
from moleblend_ray.evaluation.results import result_files
from moleblend_ray.orchestration.progress.terminal import json_text
from moleblend_ray.orchestration.status import show_status, status

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from synthetic import write_dataset


def shown(run: Path | str) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(show_status(status(StatusConfig(run=str(run)))))
    return console.export_text()


def document(run: Path | str) -> Any:
    return json.loads(json_text(status(StatusConfig(run=str(run)))))


def pretraining(folder: Path, **train: Any) -> Path:
    """A run's folder as its command leaves it after 1,000 steps, but for the tensors."""
    from moleblend_ray.training.metrics import write_records

    config = {
        "data": "s3://user:secret@bucket/data?X-Amz-Signature=abc",
        "order": {"global_batch_size": 256},
        "train": {"num_steps": 4000, "strategy": "fsdp", "precision": "bf16", **train},
        "checkpoint": {"every_steps": 1000},
        "model": {"num_layers": 12, "dim": 768},
        "seed": 0,
    }
    storage.write_json(
        str(folder / "config.json"),
        {"config": config, "data_fingerprint": "f" * 64, "versions": {}},
    )
    lines: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": 5 - step / 1000,
            "loss_spd": 2 - step / 2000,
            "step_s": 0.5,
            "data_wait_s": 0.1,
            "molecules": 256,
            "atoms": 3800,
            "mfu": 0.4,
            "padding_share": 0.1,
            "peak_memory_mib": 1234.0,
        }
        for step in range(1000)
    ]
    write_records(str(folder), lines, 0, 1000)
    commit = {
        "format": 1,
        "step": 1000,
        "world_size": 4,
        "files": [],
        "identity": {},
        "config_fingerprint": "f",
        "versions": {},
        "created": "2026-01-01T00:00:00+00:00",
        "attempt": "a",
    }
    storage.write_json(str(folder / "checkpoints" / "step-00001000" / "COMMIT.json"), commit)
    return folder


def test_a_pretraining_run_is_shown_in_words(tmp_path: Path) -> None:
    text = shown(pretraining(tmp_path))
    assert "stalled: the next checkpoint is overdue" in text
    assert "1,000 of 4,000 steps (25 %), 25 min to go once it continues" in text
    assert (
        "512 molecules/s, 500 ms per step, MFU 0.40, 10 % padding, 20.0 % of the time waiting for data"
        in text
    )
    assert "1,234 MiB" in text
    assert "↘ falling" in text
    assert "1,000  whole" in text
    assert "one is due every 8 min 20 s" in text


def test_a_run_beyond_the_steps_that_were_last_asked_for_says_so(tmp_path: Path) -> None:
    text = shown(pretraining(tmp_path, num_steps=400))
    assert "1,000 steps; the last command asked for 400" in text


def test_its_document_is_complete_and_hides_credentials(tmp_path: Path) -> None:
    found = document(pretraining(tmp_path))
    assert (found["kind"], found["state"], found["step"]) == ("pretrain", "stalled", 1000)
    assert found["eta_s"] == pytest.approx(1500)
    assert found["losses"][0]["name"] == "loss"
    assert "secret" not in json.dumps(found)
    assert "=abc" not in json.dumps(found)


def test_an_unfinished_prepare_tells_its_progress(tmp_path: Path) -> None:
    receipts = tmp_path / "receipts"
    storage.write_json(str(receipts / "plan.json"), {"options": {}, "sources": ["s3://b/x.sdf"]})
    found = document(tmp_path)
    assert (found["kind"], found["state"], found["chunks_done"]) == ("data", "unfinished", 0)
    assert "the same `moleblend prepare` continues" in shown(tmp_path)
    for chunk in range(200):
        receipt = Receipt(
            file_index=0,
            chunk_index=chunk,
            first_row=100 * chunk,
            digest="",
            rows_in=100,
            files=(),
            quarantined_by_reason={},
            unreadable_labels={},
            without_inchikey=0,
            memory_bytes=0,
            statistics=Statistics(),
        )
        storage.write_json(str(receipts / f"{part_name(0, chunk)}.json"), receipt.to_json())
    found = document(tmp_path)
    # From a sample of the receipts: a preparation of 10^9 rows has 10^5 of them.
    assert (found["chunks_done"], found["rows_in"], found["is_estimate"]) == (200, 20_000, True)
    assert "about 20,000 in" in shown(tmp_path)
    with leased(str(tmp_path)):
        assert document(tmp_path)["state"] == "running"
        assert f"a command works on it (process {os.getpid()} on" in " ".join(
            shown(tmp_path).split()
        )


def test_a_prepared_data_set_is_finished_until_a_file_is_lost(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), 30, shard_rows=10)
    assert document(tmp_path)["state"] == "finished"
    assert "30 in = 30 molecules + 0 quarantined" in shown(tmp_path)
    path = load_manifest(str(tmp_path)).shards[0].path
    (tmp_path / path).unlink()
    assert document(tmp_path)["state"] == "damaged"
    assert f"the first of them {path}" in shown(tmp_path)


def embedding(folder: Path, source: Path) -> Path:
    config = {"job": "EmbedConfig", "source": str(source), "checkpoint": "c"}
    storage.write_json(str(folder / "config.json"), {"config": config, "data_fingerprint": "f"})
    storage.write_bytes(str(folder / "parts" / "part-00000.parquet"), b"x" * 100)
    return folder


def test_an_embedding_counts_its_parts(tmp_path: Path) -> None:
    source = tmp_path / "data"
    write_dataset(str(source), 30, shard_rows=10)
    out = embedding(tmp_path / "out", source)
    found = document(out)
    assert (found["kind"], found["state"]) == ("embed", "unfinished")
    assert (found["parts_done"], found["parts"], found["molecules"], found["bytes"]) == (
        1,
        3,
        30,
        100,
    )
    # No command works on it: nothing is being made.
    detail = "its molecules are prepared, its parts or their summary are not complete; the same command continues"
    assert found["detail"] == detail
    note = storage.read_json(str(out / "config.json"))
    note["config"]["source"] = [str(source)]
    storage.write_json(str(out / "config.json"), note)
    assert document(out)["parts"] == 3
    shutil.rmtree(source)
    assert document(out)["parts"] is None
    assert "not prepared yet" in shown(out)
    summary = {"parts": [{}], "embeddings": 30, "rejected": 2, "molecules_per_s": 10.5}
    storage.write_json(str(out / result_files.EMBED.summary_name), summary)
    assert "1 of 1 parts" in shown(out)
    assert "30, 2 rows rejected" in shown(out)
    assert document(out)["state"] == "finished"
    (out / "parts/part-00000.parquet").unlink()
    assert document(out)["state"] == "unfinished"
    lost = "it was finished, but 1 of its parts are gone; the same command makes them again"
    assert document(out)["detail"] == lost


def sweep(folder: Path) -> Path:
    config = {
        "job": "SweepConfig",
        "num_trials": 4,
        "final_seeds": [0, 1],
        "task": {"name": "esol"},
    }
    storage.write_json(str(folder / "config.json"), {"config": config})

    def epochs(*scores: float, over: bool) -> list[dict[str, Any]]:
        return [
            {"valid_score": score, "best_valid_score": min(scores[: index + 1]), "over": False}
            for index, score in enumerate(scores[:-1])
        ] + [{"valid_score": scores[-1], "best_valid_score": min(scores), "over": over}]

    storage.write_json(str(folder / "tune/epochs/a.json"), epochs(0.9, 0.7, over=True))
    storage.write_json(str(folder / "tune/epochs/b.json"), epochs(0.8, 0.85, over=False))
    return folder


def test_a_sweep_counts_trials_and_seeds(tmp_path: Path) -> None:
    found = document(sweep(tmp_path))
    assert (found["state"], found["trials_done"], found["trials_begun"], found["trials"]) == (
        "unfinished", 1, 2, 4,
    )  # fmt: skip
    # The direction is not in the files yet, but each epoch says which of those before it was the best.
    assert found["best_valid_score"] == 0.7
    assert "the search is not over; the same command continues" in shown(tmp_path)
    storage.write_json(str(tmp_path / "models/seed-0/result.json"), {})
    assert document(tmp_path)["seeds_done"] == 1
    assert "not all seeds and baselines are trained" in shown(tmp_path)


def test_a_cross_validation_counts_folds_and_what_all_of_them_have(tmp_path: Path) -> None:
    config = {
        "job": "SweepConfig",
        "num_trials": 4,
        "final_seeds": [0, 1],
        "task": {"name": "esol", "folds": 3, "fold": None},
    }
    for fold in range(2):
        sweep(tmp_path / f"folds/fold-{fold}")
    storage.write_json(str(tmp_path / "config.json"), {"config": config})
    storage.write_json(str(tmp_path / "folds/fold-0/models/seed-1/result.json"), {})
    storage.write_json(str(tmp_path / "folds/fold-1/models/seed-1/result.json"), {})
    storage.write_json(str(tmp_path / "folds/fold-1/results.json"), {})
    found = document(tmp_path)
    assert (found["folds_done"], found["folds"]) == (1, 3)
    assert (found["seeds_done"], found["seeds"]) == (2, 6)
    assert (found["trials_done"], found["trials_begun"], found["trials"]) == (2, 4, 12)
    assert "1 of 3 have results" in shown(tmp_path)
    # One fold alone is as a single split, and so is what no command has asked for.
    for task in ({"name": "esol", "folds": 3, "fold": 1}, {"name": "esol", "folds": 10**12}):
        storage.write_json(str(tmp_path / "config.json"), {"config": {**config, "task": task}})
        assert (document(tmp_path)["folds"], document(tmp_path)["seeds"]) == (None, 2)


def test_results_to_which_seeds_are_being_added_are_not_finished(tmp_path: Path) -> None:
    config = {"job": "FinetuneConfig", "task": {"name": "esol"}, "seeds": [0, 1]}
    storage.write_json(str(tmp_path / "config.json"), {"config": config})
    task = {"name": "esol", "metric": "rmse", "higher_is_better": False}
    final = {"name": "model", "test": {"mean": 1.0}}
    results = {"config": config, "task": task, "trials": [], "final": final}
    storage.write_json(str(tmp_path / "results.json"), results)
    assert document(tmp_path)["state"] == "finished"
    storage.write_json(
        str(tmp_path / "results.json"), {**results, "config": {**config, "seeds": [0]}}
    )
    found = document(tmp_path)
    assert (found["state"], found["seeds"], found["test"]) == ("unfinished", 2, {"model": 1.0})
    assert "those of seeds=[1] are not; the same command continues" in found["detail"]


def test_seeds_of_an_addition_that_was_given_up_are_not_counted(tmp_path: Path) -> None:
    config = {"job": "FinetuneConfig", "task": {"name": "esol"}, "seeds": [0, 1]}
    storage.write_json(str(tmp_path / "config.json"), {"config": config})
    for seed in (0, 1, 11):
        storage.write_json(str(tmp_path / f"models/seed-{seed}/result.json"), {})
    assert document(tmp_path)["seeds_done"] == 2


@pytest.mark.parametrize("job", ["SweepConfig", "FinetuneConfig"])
def test_molecules_of_a_training_are_prepared_wherever_they_lie(tmp_path: Path, job: str) -> None:
    # Those of a prepared source are not below `out`.
    config = {"job": job, "task": {"name": "esol"}}
    storage.write_json(str(tmp_path / "config.json"), {"config": config})
    assert "its molecules are prepared, no training is recorded yet" in document(tmp_path)["detail"]


def test_several_tasks_are_listed_with_what_failed(tmp_path: Path) -> None:
    rows = [
        {"name": "esol", "status": "finished"},
        {"name": "bbbp", "status": "failed", "reason": "no column"},
        {"name": "bace", "status": "waiting"},
    ]
    storage.write_json(str(tmp_path / "leaderboard.json"), {"tasks": rows})
    found = document(tmp_path)
    assert (found["state"], found["detail"][:35]) == (
        "failed",
        "1 of 3 tasks have results; the same",
    )
    assert "no column" in shown(tmp_path)


@pytest.mark.parametrize("kind", ["embed", "sweep", "tasks"])
def test_what_a_command_works_on_is_running(tmp_path: Path, kind: str) -> None:
    if kind == "embed":
        folder = embedding(tmp_path, tmp_path / "library.csv")
    elif kind == "sweep":
        folder = sweep(tmp_path)
    else:
        folder = tmp_path / "tasks"
        tasks = [{"name": "esol", "status": "failed"}, {"name": "bbbp", "status": "waiting"}]
        storage.write_json(str(folder / "leaderboard.json"), {"tasks": tasks})
    before = document(folder)
    assert before["state"] == ("failed" if kind == "tasks" else "unfinished")
    with leased(str(folder)):
        found = document(folder)
    assert (found["kind"], found["state"]) == (kind, "running")
    assert f"; a command works on it (process {os.getpid()} on" in found["detail"]
    assert document(folder) == before


def test_a_command_that_adds_to_finished_tasks_is_running(tmp_path: Path) -> None:
    tasks = [{"name": "esol", "status": "finished"}]
    storage.write_json(str(tmp_path / "leaderboard.json"), {"tasks": tasks})
    assert document(tmp_path)["state"] == "finished"
    with leased(str(tmp_path), lambda _: False):
        found = document(tmp_path)
    assert found["state"] == "running"
    assert "1 of 1 tasks have results; a command works on it" in found["detail"]


@pytest.mark.parametrize("folder", ["data", "prepared"])
def test_a_command_that_has_not_noted_what_it_is_for_is_told_from_none(
    tmp_path: Path, folder: str
) -> None:
    # Preparing molecules with conformers can take an hour, and the note is written after it.
    with leased(str(tmp_path), lambda _: False):
        found = document(tmp_path)
        assert (found["kind"], found["state"]) == ("begun", "running")
        assert found["detail"].startswith("nothing is written yet; a command works on")
        plan = {"options": {"rows_per_chunk": 64}, "sources": ["library.csv"]}
        storage.write_json(str(tmp_path / folder / "receipts/plan.json"), plan)
        assert "its molecules are not all prepared: 0 rows so far" in document(tmp_path)["detail"]
    found = document(tmp_path)
    assert found["state"] == "unfinished"
    assert found["detail"].endswith("rows so far; the same command continues")
    assert "unfinished: its molecules are not all prepared" in shown(tmp_path)


@pytest.mark.parametrize("where", ["missing", "empty"])
def test_a_directory_of_no_command_is_an_error_that_says_what_is_expected(
    tmp_path: Path, where: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected the `out` of prepare, pretrain, sweep"):
        status(StatusConfig(run=str(tmp_path / where)))


def places(value: Any, *above: str | int) -> Iterator[tuple[str | int, ...]]:
    """The place of every value in a JSON document, of lists those of the first item."""
    yield above
    if isinstance(value, list):
        value = dict(enumerate(value[:1]))
    for name, item in value.items() if isinstance(value, dict) else ():
        yield from places(item, *above, name)


def changed(value: Any, place: tuple[str | int, ...], new: object) -> Any:
    """The document with another value at a place."""
    if not place:
        return new
    copy = value.copy()
    copy[place[0]] = changed(value[place[0]], place[1:], new)
    return copy


WRONG: tuple[Any, ...] = (None, "[/]", 7, 0.5, [1], {})


def several_tasks(folder: Path) -> Path:
    rows = [{"name": "esol", "status": "failed", "reason": "no column"}]
    storage.write_json(str(folder / "leaderboard.json"), {"tasks": rows})
    return folder


def finished_sweep(folder: Path) -> Path:
    models = [{"name": name, "test": {"mean": 0.5}} for name in ("MoleBLEND", "forest")]
    results = {
        "task": {"name": "esol", "metric": "rmse", "higher_is_better": False},
        "trials": [{"valid_score": 0.6}],
        "final": models[0],
        "baselines": models[1:],
    }
    storage.write_json(str(sweep(folder) / "results.json"), results)
    return folder


def finished_embedding(folder: Path) -> Path:
    summary = {"parts": [{}], "embeddings": 30, "rejected": 2, "molecules_per_s": 10.5}
    storage.write_json(
        str(embedding(folder, folder / "source") / result_files.EMBED.summary_name), summary
    )
    return folder


def finished_run(folder: Path) -> Path:
    storage.write_json(str(pretraining(folder) / "FINISHED.json"), {"steps": 1000})
    return folder


def data_set(folder: Path) -> Path:
    write_dataset(str(folder), 30, shard_rows=10)
    return folder


@pytest.mark.parametrize(
    "make",
    [
        pretraining,
        finished_run,
        sweep,
        finished_sweep,
        finished_embedding,
        several_tasks,
        data_set,
    ],
    ids=lambda make: str(make.__name__),
)
def test_wrong_types_anywhere_in_a_document_are_told_in_words(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    folder = make(tmp_path)
    told = 0
    for file in folder.rglob("*.json"):
        whole = file.read_text()
        for place in places(json.loads(whole)):
            for wrong in WRONG:
                file.write_text(json.dumps(changed(json.loads(whole), place, wrong)))
                try:
                    shown(folder)
                except MoleBlendError:
                    told += 1
        file.write_text(whole)
    assert told > 0


def test_lines_that_are_no_records_are_left_out_of_the_rates(tmp_path: Path) -> None:
    (file,) = (pretraining(tmp_path) / "metrics").iterdir()
    rates = document(tmp_path)["rates"]
    lines: list[Any] = [{"step": "x"}, {"step": 3, "loss": None}, {"step": 4, "step_s": "1"}, [], 7]
    for line in lines:
        file.write_text(json.dumps(line) + "\n" + file.read_text() + json.dumps(line) + "\n")
    assert document(tmp_path)["rates"] == rates


@pytest.mark.parametrize("document", [[], {}, {"config": None}, {"config": "job"}], ids=str)
def test_settings_of_another_program_are_those_of_no_command(
    tmp_path: Path, document: object
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="holds nothing that a command of moleblend began"):
        status(StatusConfig(run=str(tmp_path)))


@pytest.mark.parametrize(
    "foreign", [[], {}, {"task": {"name": "x"}}, {"tasks": [{"id": 1}]}, 3], ids=str
)
@pytest.mark.parametrize("name", ["results.json", "embeddings.json", "leaderboard.json"])
def test_a_file_of_another_program_is_named(tmp_path: Path, name: str, foreign: object) -> None:
    job = {"results.json": "SweepConfig", "embeddings.json": "EmbedConfig"}.get(name)
    if job is not None:
        settings = {"config": {"job": job, "task": {"name": "esol"}}}
        storage.write_json(str(tmp_path / "config.json"), settings)
    storage.write_json(str(tmp_path / name), foreign)
    with pytest.raises(DataError, match=rf"{name} (has|holds) no .*another program wrote it"):
        status(StatusConfig(run=str(tmp_path)))


@pytest.mark.parametrize("foreign", [[], {"epoch": 1}, [{"epoch": 1}], [1], 3], ids=str)
def test_a_file_of_another_program_among_those_of_trials_is_left_out(
    tmp_path: Path, foreign: object
) -> None:
    storage.write_json(str(sweep(tmp_path) / "tune/epochs/c.json"), foreign)
    assert document(tmp_path)["trials_begun"] == 2


@pytest.mark.parametrize("job", ["Other", 3, [], None], ids=str)
def test_a_job_of_another_program_is_none_of_ours(tmp_path: Path, job: object) -> None:
    storage.write_json(str(tmp_path / "config.json"), {"config": {"job": job}})
    with pytest.raises(DataError, match="holds nothing that a command of moleblend began"):
        status(StatusConfig(run=str(tmp_path)))


def test_an_empty_uri_is_refused() -> None:
    with pytest.raises(ConfigError, match="run: expected a path or URI"):
        load_config(StatusConfig, "status", ["run=''"])


def test_a_refit_tells_its_models(tmp_path: Path) -> None:
    question = {"job": "RefitConfig", "results": "s3://user:secret@bucket/esol"}
    storage.write_json(str(tmp_path / "config.json"), {"config": question, "chosen": {}})
    for seed in (0, 1):
        storage.write_json(str(tmp_path / f"models/seed-{seed}/result.json"), {})
    (tmp_path / "models/seed-2").mkdir()
    text = shown(tmp_path)
    assert "unfinished: not all models are trained; the same command continues" in text
    assert "secret" not in text
    assert "bucket/esol" in text
    assert (found := document(tmp_path))["models_done"] == 2
    assert (found["kind"], found["molecules"]) == ("refit", None)
    with leased(str(tmp_path), lambda _: False):
        assert document(tmp_path)["state"] == "running"
    storage.write_json(str(tmp_path / "refit.json"), {"results": "esol", "molecules": 1128})
    assert "finished: its list of models (refit.json) is there" in shown(tmp_path)
    assert "1,128, for each model" in shown(tmp_path)
    with leased(str(tmp_path), lambda _: False):  # for further seeds of the results
        assert document(tmp_path)["state"] == "running"


def test_an_object_store_is_looked_at_alike(s3_uri: str, tmp_path: Path) -> None:
    run = pretraining(tmp_path)
    for file in run.rglob("*"):
        if file.is_file():
            storage.upload(file, storage.join(s3_uri, file.relative_to(run).as_posix()))
    there, here = document(s3_uri), document(run)
    for found in (there, here):
        found.pop("uri")
        found.pop("age_s")
    assert there == here


def test_neither_ray_nor_torch_is_imported() -> None:
    code = "import sys, moleblend_ray.orchestration.status\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"ray", "torch", "rdkit"} & set(done.stdout.split())


def test_names_of_files_are_those_of_results_that_exist() -> None:
    assert {name: value for name, value in vars(result_files).items() if name.isupper()} == {
        "IDENTITY_NAME": "config.json",
        "RESULTS_NAME": "results.json",
        "FOLDS_DIR": "folds",
        "OUT_OF_FOLD_NAME": "out_of_fold.parquet",
        "REPORT_NAME": "report.md",
        "DATA_DIR": "data",
        "MODELS_DIR": "models",
        "SEED_RESULT_NAME": "result.json",
        "REFIT_NAME": "refit.json",
        "BASELINES_DIR": "baselines",
        "TUNE_DIR": "tune",
        "EPOCHS_DIR": "tune/epochs",
        "LEADERBOARD_NAME": "leaderboard",
        "PREPARED_DIR": "prepared",
        "PARTS_DIR": "parts",
        "EMBED": ("embed", "embeddings"),
        "PREDICT": ("predict", "predictions"),
    }
    assert result_files.EMBED.summary_name == "embeddings.json"
    assert result_files.PREDICT.summary_name == "predictions.json"
    assert MANIFEST_NAME == "manifest.json"


def test_what_are_no_settings_is_named() -> None:
    with pytest.raises(ConfigError, match=r"expected settings, such as .* found 'runs/first'"):
        status("runs/first")  # type: ignore[arg-type]
