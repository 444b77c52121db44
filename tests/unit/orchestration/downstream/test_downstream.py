"""A folder of results is for one question, one data set and one set of weights, and shows no credentials."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from in_process import prepare_in_process

from moleblend_ray.chemistry.scaffolds import Split
from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.downstream import FinetuneConfig, SweepConfig, TaskConfig
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.config.pretrain import PretrainConfig
from moleblend_ray.data.dataset.dataset_files import listed
from moleblend_ray.data.dataset.lease import InUseError, Lease, leased
from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.splits import NamedSplits
from moleblend_ray.data.sources import ColumnConfig
from moleblend_ray.errors import CheckpointError, ConfigError, DataError, StorageError
from moleblend_ray.evaluation.molecules.repeats import Repeats
from moleblend_ray.evaluation.molecules.replicates import Replicates
from moleblend_ray.evaluation.results.results import RESULTS_VERSION
from moleblend_ray.evaluation.search import SearchSpace
from moleblend_ray.evaluation.settings import FinetuneSettings
from moleblend_ray.evaluation.tasks import ReplicateRule, SplitKind, TaskKind
from moleblend_ray.model.config import ModelConfig
from moleblend_ray.orchestration.downstream import downstream
from moleblend_ray.orchestration.downstream import finetune as finetune_module
from moleblend_ray.orchestration.downstream import sweep as sweep_module
from moleblend_ray.orchestration.downstream.downstream import (
    Inputs,
    Loaded,
    LostWorkError,
    check_cluster,
    collect,
    prepare_task,
    read_inputs,
    require_coordinates,
    set_up,
    split_of,
    starting_point,
)
from moleblend_ray.orchestration.identity import check_claim, check_finished, claim, question
from moleblend_ray.orchestration.preparation import molecules as molecules_module
from moleblend_ray.settings import to_dict

QUESTION = {"job": "EmbedConfig", "source": "https://me:secret@host/a?Signature=s3cret&id=1"}
IDENTITY = {"config": QUESTION, "data_fingerprint": "aaa", "checkpoint_fingerprint": "bbb"}
TINY = ModelConfig(num_layers=1, dim=16, ffn_dim=16, num_heads=2, num_kernels=4, pair_dim=2)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What a cluster is asked for, in order; it has everything."""
    asked: list[object] = []
    monkeypatch.setattr(downstream, "require_room", lambda need, *_: asked.append(need.resources))
    monkeypatch.setattr(downstream, "require_shared_paths", lambda paths: asked.append(set(paths)))
    monkeypatch.setattr(downstream, "warn_of_unused_gpus", asked.append)
    return asked


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command may start Ray."""

    def fail(cluster: ClusterConfig) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(finetune_module, "ray_session", fail)


def finetuning(folder: Path, **changes: Any) -> FinetuneConfig:
    source = folder / "esol.csv"
    source.write_text("smiles,y,part\nCCO,1,train\n")
    task = TaskConfig(name="esol", source=str(source), **changes)
    return FinetuneConfig(task=task, out=str(folder / "out"), checkpoint=str(folder / "encoder"))


def test_a_training_part_of_one_class_ends_before_anything_is_trained_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.array([[0.0], [0.0], [0.0], [1.0], [0.0], [1.0]])
    molecules = SimpleNamespace(
        labels=labels,
        bounds=None,
        unit=None,
        num_unreadable=0,
        columns=("y",),
        smiles=("C",) * 6,
        groups=None,
        parts=np.array([0, 0, 1, 1, 2, 2]),
    )
    monkeypatch.setattr(downstream, "check_cluster", lambda config: None)
    monkeypatch.setattr(downstream, "prepare_task", lambda *_: "data")
    monkeypatch.setattr(downstream, "load_labelled", lambda *_, **__: molecules)
    task = TaskConfig(
        name="hits",
        source="a.csv",
        columns=("y",),
        kind=TaskKind.CLASSIFICATION,
        split=SplitKind.GIVEN,
    )
    config = FinetuneConfig(task=task, out=str(tmp_path / "out"))
    inputs = Inputs(start=starting_point(config), named=None, sources=None)
    with pytest.raises(
        DataError, match="'y' does not have both classes among the 2 training molecules"
    ):
        set_up(config, inputs)
    assert not (tmp_path / "out").exists()


def test_molecules_in_two_parts_are_told_with_an_example_before_training(
    caplog: pytest.LogCaptureFixture,
) -> None:
    smiles = ("CCN", "CCO", "CCC", "Cl.CCN")
    molecules: Any = SimpleNamespace(smiles=smiles, mol_ids=("a", "b", "c", "d"))
    split = Split(*map(np.array, ([0], [1], [2])))
    repeats = Repeats(distinct=3, test_seen=0, valid_seen=0, example=None)
    downstream._warn_of_seen(repeats, molecules, split)
    assert not caplog.text
    split = Split(*map(np.array, ([0], [1], [2, 3])))
    repeats = Repeats(distinct=3, test_seen=1, valid_seen=0, example=(3, 0))
    downstream._warn_of_seen(repeats, molecules, split)
    assert "1 of 2 test molecules are also in the training or validation part" in caplog.text
    assert "'d' (Cl.CCN) is 'a' (CCN)" in caplog.text


@pytest.mark.parametrize(
    ("name", "rule", "told"),
    [
        ("esol", ReplicateRule.KEEP, "each counts (task.replicates=median makes one of them)"),
        ("esol", ReplicateRule.MEAN, "one each, with the mean of their labels"),
        ("bbbp", ReplicateRule.MEAN, "one each, with the more frequent class"),
    ],
)
def test_rows_of_one_molecule_are_told_with_what_becomes_of_them(
    caplog: pytest.LogCaptureFixture, name: str, rule: ReplicateRule, told: str
) -> None:
    task = TaskConfig(name=name, source="a.csv").resolve()
    none = Replicates(rule=rule, molecules=0, rows=0, spreads={})
    some = Replicates(rule=rule, molecules=2, rows=5, spreads={}, undecided=3, dropped=1)
    with caplog.at_level(logging.INFO):
        downstream._tell_of_replicates(task, none)
        assert not caplog.text
        downstream._tell_of_replicates(task, some)
    assert f"{name}: 2 molecules have several rows, 5 in all: {told}" in caplog.text
    assert "1 molecules are left out" in caplog.text


@pytest.mark.parametrize(
    ("rule", "split", "expected"),
    [
        ("keep", "random", [1.0, 5.0, 2.0, 9.0]),
        ("mean", "random", [4.0, 5.0]),
        ("median", "random", [2.0, 5.0]),
        # The last row is in another part.
        ("mean", "given", [1.5, 5.0, 9.0]),
    ],
)
def test_a_task_has_the_labels_that_its_rule_for_replicates_gives(
    tmp_path: Path, rule: str, split: str, expected: list[float]
) -> None:
    rows = ["CCO,1", "CCN,5", "OCC,2", "C(O)C,9"]
    (tmp_path / "a.csv").write_text("\n".join(["smiles,y", *rows]) + "\n")
    data = str(tmp_path / "data")
    options = ConvertOptions(columns=ColumnConfig(label_columns=("y",)))
    prepare_in_process(str(tmp_path / "a.csv"), data, options)
    config = TaskConfig(
        name="own",
        source=data,
        columns=("y",),
        kind=TaskKind.REGRESSION,
        split=SplitKind(split),
        replicates=ReplicateRule(rule),
    )
    named = NamedSplits({"train": np.arange(3), "test": np.array([3])}, None, "the test")
    molecules, replicates = downstream._read_molecules(config, config.resolve(), data, named)
    assert molecules.labels[:, 0].tolist() == expected
    assert replicates.rule is ReplicateRule(rule)


@pytest.mark.parametrize(
    ("name", "asked", "units", "expected", "is_told"),
    [
        ("qm9_gap", None, ["eV"], "eV", True),
        ("qm9_gap", None, ["hartree"], "hartree", False),
        ("qm9_gap", "electronvolt", ["eV"], "electronvolt", False),
        ("qm9_gap", None, [None], "hartree", False),
        ("own", None, ["eV", "eV"], "eV", False),
        ("own", None, ["eV", "Debye"], "", False),
        ("own", None, ["eV", None], "", False),
    ],
)
def test_results_are_in_the_unit_that_the_data_state(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    asked: str | None,
    units: list[str | None],
    expected: str,
    is_told: bool,
) -> None:
    columns = ("gap", "mu")[: len(units)]
    fields = [
        pa.field(column, pa.float64(), metadata={"unit": unit} if unit else None)
        for column, unit in zip(columns, units, strict=True)
    ]
    smiles = ["C" * length for length in range(1, 7)]
    values = [[float(length) for length in range(6)]] * len(columns)
    schema = pa.schema([pa.field("smiles", pa.string()), *fields])
    pq.write_table(pa.table([smiles, *values], schema=schema), tmp_path / "a.parquet")
    data = str(tmp_path / "data")
    prepare_in_process(str(tmp_path / "a.parquet"), data, ConvertOptions(columns=ColumnConfig()))
    task = TaskConfig(
        name=name,
        source=data,
        columns=columns,
        kind=TaskKind.REGRESSION,
        split=SplitKind.GIVEN,
        unit=asked,
    )
    config = FinetuneConfig(task=task, out=str(tmp_path / "out"), model=TINY)
    parts = {"train": np.arange(2), "valid": np.arange(2, 4), "test": np.arange(4, 6)}
    named = NamedSplits(parts, None, "the test")
    monkeypatch.setattr(downstream, "check_cluster", lambda config: None)
    monkeypatch.setattr(ray, "put", lambda value: value)
    with caplog.at_level(logging.WARNING):
        bench = set_up(config, Inputs(start=starting_point(config), named=named, sources=None))
    assert bench.experiment.task.unit == expected
    assert ("are in eV, and not in hartree" in caplog.text) == is_told


def test_a_split_by_time_tests_on_the_newest_labelled_molecules(tmp_path: Path) -> None:
    years = np.random.default_rng(0).permutation(np.arange(2000, 2020)).tolist()
    rows = [f"{'C' * (row + 1)},{row % 7},{year}" for row, year in enumerate(years)]
    source = tmp_path / "assay.csv"
    source.write_text("\n".join(["smiles,y,year", "CCN,,2030", *rows]) + "\n")
    task = TaskConfig(
        name="mine",
        source=str(source),
        columns=("y",),
        kind=TaskKind.REGRESSION,
        split=SplitKind.TIME,
        split_column="year",
    )
    config = FinetuneConfig(task=task, out=str(tmp_path / "out"), model=TINY)
    named = downstream.read_inputs(config).named
    options = ConvertOptions(columns=ColumnConfig(label_columns=("y",)), valid_fraction=0.0)
    prepare_in_process(str(source), str(tmp_path / "data"), options)
    data_uri = str(tmp_path / "data")
    molecules, replicates = downstream._read_molecules(task, task.resolve(), data_uri, named)
    loaded = Loaded(
        data_uri=data_uri,
        task=task.resolve(),
        molecules=molecules,
        replicates=replicates,
        start=starting_point(config),
        named=named,
    )
    split = split_of(config, loaded)
    found = [sorted(years[len(molecules.smiles[row]) - 1] for row in part) for part in split]
    assert found == [list(range(2000, 2016)), [2016, 2017], [2018, 2019]]


def test_classes_have_no_unit() -> None:
    config = TaskConfig(name="bbbp", source="a.parquet")
    assert downstream._in_unit_of_data(config, config.resolve(), "class").unit == ""


def test_a_cluster_is_asked_for_room_for_one_training_and_for_shared_paths(
    tmp_path: Path, checks: list[object]
) -> None:
    config = finetuning(tmp_path)
    check_cluster(config)
    # The checkpoint is read by this process alone.
    assert checks[:2] == [{"CPU": 1.0}, {"out", "task.source"}]
    checks.clear()
    cluster = ClusterConfig(use_gpu=True, cpus_per_worker=2.0)
    check_cluster(dataclasses.replace(config, cluster=cluster, gpus_per_worker=0.25))
    assert checks[0] == {"CPU": 2.0, "GPU": 0.25}
    assert checks[2] == cluster
    checks.clear()
    (tmp_path / "manifest.json").write_text("{}")
    prepared = dataclasses.replace(config.task, source=str(tmp_path))
    check_cluster(dataclasses.replace(config, task=prepared))
    assert checks[1] == {"out"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, CheckpointError, "names no model"),
        ({"split_column": "prat"}, DataError, "has no column 'prat'"),
        ({"split_file": "/no/such/splits.csv"}, StorageError, "splits.csv"),
    ],
)
def test_what_can_be_wrong_without_molecules_is_found_before_ray_is_started(
    tmp_path: Path,
    no_ray: None,
    changes: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    config = finetuning(tmp_path, **changes)
    if changes:
        config = dataclasses.replace(config, checkpoint=None)
    with pytest.raises(error, match=message):
        finetune_module.finetune(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "finetune", "choices", "message"),
    [
        ("regression", {"frozen_blocks": 2}, {}, "frozen_blocks: expected at most 1, .* found 2"),
        ("regression", {}, {"fresh_blocks": (0, 1, 3)}, "fresh_blocks: expected at most 1, .* 3"),
        ("classification", {"atom_reference": True}, {}, "atom_reference: .* classification"),
        ("classification", {}, {"atom_reference": (False, True)}, "atom_reference: .* classif"),
    ],
)
def test_settings_that_fit_no_model_or_labels_leave_the_folder_to_others(
    tmp_path: Path,
    no_ray: None,
    kind: str,
    finetune: dict[str, Any],
    choices: dict[str, Any],
    message: str,
) -> None:
    source = tmp_path / "t.csv"
    source.write_text("smiles,y\nCCO,1\n")
    common: dict[str, Any] = {
        "task": TaskConfig(name="t", source=str(source), columns=("y",), kind=TaskKind(kind)),
        "out": str(tmp_path / "out"),
        "model": TINY,
        "finetune": FinetuneSettings(**finetune),
    }
    run: Callable[[], object] = partial(finetune_module.finetune, FinetuneConfig(**common))
    if choices:
        search = SearchSpace(choices=choices)
        run = partial(sweep_module.sweep, SweepConfig(**common, search=search))
    with pytest.raises(ConfigError, match=message):
        run()
    assert not (tmp_path / "out").exists()


MISSING_COLUMNS = [
    (
        {"columns": ("pIC50",)},
        r"^task\.columns: .*esol\.csv has no 'pIC50'; it has 'smiles', 'y'",
    ),
    ({"columns": ("y",), "smiles_column": "SMILES"}, r"^task\.smiles_column: .*mean 'smiles'"),
    ({"columns": ("y",), "id_column": "name"}, r"^task\.id_column: .*has no 'name'"),
    (
        {"columns": ("y",), "censored": True, "relation_column": "relation"},
        r"^task\.relation_column: .*has no 'relation'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISSING_COLUMNS)
def test_a_missing_column_is_told_by_the_setting_of_the_task(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare_task(finetuning(tmp_path, **changes), None)


@pytest.mark.parametrize("job", ["finetune", "sweep"])
@pytest.mark.parametrize(("changes", "message"), MISSING_COLUMNS)
def test_a_missing_column_is_found_before_ray_is_started(
    tmp_path: Path, no_ray: None, changes: dict[str, object], message: str, job: str
) -> None:
    config = dataclasses.replace(finetuning(tmp_path, **changes), checkpoint=None)
    run: Callable[[], object] = partial(finetune_module.finetune, config)
    if job == "sweep":
        run = partial(sweep_module.sweep, SweepConfig(task=config.task, out=config.out))
    with pytest.raises(ConfigError, match=message):
        run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("smiles,y\nCCO,active\nC,inactive\n", (), "has no column of numbers for the labels"),
        ("smiles,y\nCCO,active\nC,inactive\n", ("y",), r"no row has a number in any of.*\['y'\]"),
        ('smiles,y\nCCO,"1,5"\nC,\n', ("y",), r"write .* decimal point \(no comma\)"),
        ("smiles;y\nCCO;1,5\nC;>10\n", ("y",), r"write .* decimal point \(no comma\)"),
        ("smiles,y\nCCO,\nC,?\n", ("y",), "no row has a number"),
        (
            "smiles,y\nCCO,active\nC,inactive\n",
            ("y",),
            r"which hold active, inactive: write classes as 0 and 1, or name their words \(task\.classes=",
        ),
    ],
)
def test_a_table_without_a_label_is_found_before_ray_is_started(
    tmp_path: Path, no_ray: None, content: str, columns: tuple[str, ...], message: str
) -> None:
    (tmp_path / "table.csv").write_text(content)
    task = TaskConfig(name="sider", source=str(tmp_path / "table.csv"), columns=columns)
    with pytest.raises(DataError, match=message):
        finetune_module.finetune(FinetuneConfig(task=task, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("unit", "summarised"), [("", None), ("nM", "nM")])
def test_a_summary_has_no_unit_where_the_task_names_none(unit: str, summarised: str | None) -> None:
    score = {"mean": 0.5, "std": 0.0, "values": [0.5]}
    results = {
        "task": {"name": "mine", "metric": "rmse", "unit": unit},
        "data": {"molecules": 3},
        "final": {"valid": score, "test": score},
        "baselines": [],
        "seconds": 1.0,
    }
    found = finetune_module.summarise("out", results, already_finished=False)
    assert found.unit == summarised


def test_bounds_alone_are_no_labels_and_are_told_as_such(tmp_path: Path, no_ray: None) -> None:
    (tmp_path / "table.csv").write_text("smiles,y\nCCO,>10\nC,<2\n")
    task = TaskConfig(
        name="mine",
        source=str(tmp_path / "table.csv"),
        columns=("y",),
        kind=TaskKind.REGRESSION,
        censored=True,
    )
    with pytest.raises(
        DataError, match=r"\['y'\], which hold >10, <2: bounds .* alone .* must be measured"
    ):
        finetune_module.finetune(FinetuneConfig(task=task, out=str(tmp_path / "out")))


def test_a_label_that_a_prepared_dataset_lacks_is_found_before_ray_is_started(
    tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    manifest = SimpleNamespace(label_names=lambda: ("y",))
    monkeypatch.setattr(downstream, "load_manifest", lambda uri: manifest)
    task = TaskConfig(
        name="mine", source=str(tmp_path / "data"), columns=("pIC50",), kind=TaskKind.REGRESSION
    )
    with pytest.raises(DataError, match=r"needs the label columns \['pIC50'\].*it has: y\."):
        finetune_module.finetune(FinetuneConfig(task=task, out=str(tmp_path / "out")))


@pytest.mark.parametrize("job", ["finetune", "sweep"])
def test_settings_of_raw_molecules_are_refused_with_prepared_ones_before_ray_is_started(
    tmp_path: Path, no_ray: None, job: str
) -> None:
    library = tmp_path / "data"
    library.mkdir()
    (library / "manifest.json").write_text("{}")
    task = TaskConfig(name="esol", source=str(library), smiles_column="SMILES", max_atoms=50)
    run: Callable[[], object] = partial(
        finetune_module.finetune, FinetuneConfig(task=task, out=str(tmp_path / "out"))
    )
    if job == "sweep":
        run = partial(sweep_module.sweep, SweepConfig(task=task, out=str(tmp_path / "out")))
    with pytest.raises(
        ConfigError,
        match=rf"^task\.smiles_column, task\.max_atoms: only for raw .* but {library} is",
    ):
        run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("job", ["finetune", "sweep"])
def test_the_folder_of_a_pretraining_run_is_told_by_its_command_before_ray_is_started(
    tmp_path: Path, no_ray: None, job: str
) -> None:
    config = dataclasses.replace(finetuning(tmp_path), checkpoint=None)
    run_settings = to_dict(PretrainConfig(data="/data", out=config.out))
    storage.write_json(storage.join(config.out, "config.json"), {"config": run_settings})
    run: Callable[[], object] = partial(finetune_module.finetune, config)
    if job == "sweep":
        run = partial(sweep_module.sweep, SweepConfig(task=config.task, out=config.out))
    with pytest.raises(
        ConfigError,
        match=rf"^out: .*/out holds results of `moleblend pretrain`\. .* for `moleblend {job}`$",
    ):
        run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


@pytest.mark.parametrize("job", ["finetune", "sweep"])
def test_results_that_another_command_works_on_are_left_alone(
    tmp_path: Path, no_ray: None, job: str
) -> None:
    config = dataclasses.replace(finetuning(tmp_path, columns=("y",)), checkpoint=None)
    run: Callable[[], object] = partial(finetune_module.finetune, config)
    if job == "sweep":
        run = partial(sweep_module.sweep, SweepConfig(task=config.task, out=config.out))
    with leased(config.out):
        before = listed(config.out)
        with pytest.raises(InUseError, match=rf"^out: another command works on {config.out} at"):
            run()
        assert listed(config.out) == before
    with pytest.raises(AssertionError, match="Ray was started"):
        run()


def test_results_that_another_command_finished_meanwhile_are_these(
    tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(finetuning(tmp_path, columns=("y",)), checkpoint=None)
    stored = {"results_version": RESULTS_VERSION, "config": question(config)}
    stored = json.loads(json.dumps(stored))

    @contextmanager
    def after_another(out: str, is_finished: Callable[[str], bool]) -> Iterator[Lease]:
        claim(out, {"config": question(config), "checkpoint_fingerprint": None})
        storage.write_json(storage.join(out, "results.json"), stored)
        with leased(out, is_finished) as lease:
            yield lease

    monkeypatch.setattr(finetune_module, "leased", after_another)
    found = finetune_module.compute_results(config, [0], finetune_module.train)
    assert found == (stored, True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "results.json",
    ]


def test_no_results_are_written_after_another_command_has_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(finetuning(tmp_path, columns=("y",)), checkpoint=None)
    written: list[object] = []

    def train(config: FinetuneConfig, bench: Any) -> Any:
        # Another command believes that this one is dead.
        storage.write_json(storage.join(config.out, "leases", "000002.json"), {"token": "another"})

    monkeypatch.setattr(finetune_module, "ray_session", lambda _: nullcontext())
    monkeypatch.setattr(finetune_module, "set_up", lambda *_: None)
    monkeypatch.setattr(finetune_module, "run_baselines", lambda *_: None)
    monkeypatch.setattr(finetune_module, "write_results", lambda *_, **__: written.append(1))
    with pytest.raises(InUseError, match="has taken over the work on"):
        finetune_module.compute_results(config, [0], train)
    assert written == []


def write_result(out: str) -> None:
    """The result of a first seed, which belongs to the settings that ``out`` is noted for."""
    storage.write_json(storage.join(out, "models/seed-0/result.json"), {})


def test_settings_that_led_to_no_result_do_not_bind_the_next_command(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = str(tmp_path)
    claim(out, IDENTITY)
    storage.write_json(storage.join(out, "data/manifest.json"), {})
    with leased(out), caplog.at_level(logging.INFO, "moleblend_ray"):
        other = {**IDENTITY, "checkpoint_fingerprint": "ccc"}
        check_claim(out, other)
        claim(out, other)
    assert caplog.text.count("has no results: beginning anew (checkpoint_fingerprint: ") == 1
    write_result(out)
    with pytest.raises(ConfigError, match="'ccc' there, 'bbb' here"):
        claim(out, IDENTITY)


def test_other_settings_are_refused_before_molecules_are_prepared(
    tmp_path: Path, no_ray: None
) -> None:
    config = dataclasses.replace(finetuning(tmp_path, columns=("y",)), checkpoint=None)
    claim(config.out, {**IDENTITY, "config": question(config)})
    with pytest.raises(AssertionError, match="Ray was started"):
        finetune_module.finetune(config)
    write_result(config.out)
    with pytest.raises(ConfigError, match=r"differ in config\.split_seed: 0 there, 5 here"):
        finetune_module.finetune(dataclasses.replace(config, split_seed=5))


def test_of_a_directory_of_several_tables_the_one_of_the_task_is_read(
    tmp_path: Path, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tables").mkdir()
    for name in ("esol", "bbbp"):
        (tmp_path / "tables" / f"{name}.csv").write_text("smiles\nC\n")
    read: list[str] = []

    def stop(config: FinetuneConfig) -> None:
        read.append(config.task.source)
        raise DataError("as far as this test goes")

    monkeypatch.setattr(finetune_module, "read_inputs", stop)
    task = TaskConfig(name="esol", source=str(tmp_path / "tables"))
    with pytest.raises(DataError, match="as far as"):
        finetune_module.finetune(FinetuneConfig(task=task, out=str(tmp_path / "out")))
    assert read == [str(tmp_path / "tables/esol.csv")]


def test_the_source_that_was_looked_at_is_what_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(finetuning(tmp_path, columns=("y",)), checkpoint=None)
    sources = read_inputs(config).sources
    assert sources is not None
    assert [label.name for label in sources.labels] == ["y"]
    given: list[object] = []
    monkeypatch.setattr(
        molecules_module, "prepare", lambda *_, sources, **__: given.append(sources)
    )
    prepare_task(config, None, sources)
    assert given == [sources]


class Tasks:
    """Stands in for Ray: the first of the tasks ends with an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        self.cancelled: list[str] = []
        shown = SimpleNamespace(reporter=lambda values: None)
        monkeypatch.setattr(downstream, "Progress", lambda *_, **__: nullcontext(shown))
        monkeypatch.setattr(ray, "wait", lambda waiting, num_returns: (waiting[:1], waiting[1:]))
        monkeypatch.setattr(ray, "get", self.fail)
        monkeypatch.setattr(ray, "cancel", lambda task, force: self.cancelled.append(task))
        self.error = error

    def fail(self, task: str) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ray.exceptions.WorkerCrashedError(), LostWorkError),
        (ray.exceptions.RayTaskError("f", "traceback", ValueError("oops")), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_what_still_runs_is_stopped_whatever_ended_the_rest(
    monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[BaseException]
) -> None:
    tasks = Tasks(monkeypatch, error)
    with pytest.raises(raised):
        collect({"a": 0, "b": 1, "c": 2}, "seeds")
    assert tasks.cancelled == ["b", "c"]


def inputs(**changes: str) -> Mapping[str, str | None]:
    return {"data_fingerprint": "aaa", "checkpoint_fingerprint": "bbb", **changes}


def test_credentials_are_not_stored_and_do_not_make_another_question(tmp_path: Path) -> None:
    claim(str(tmp_path), IDENTITY)
    write_result(str(tmp_path))
    text = (tmp_path / "config.json").read_text()
    assert "secret" not in text
    assert "s3cret" not in text
    newly_signed = {**QUESTION, "source": "https://you:pw@host/a?Signature=other&id=1"}
    claim(str(tmp_path), {**IDENTITY, "config": newly_signed})
    check_finished(str(tmp_path), newly_signed, inputs)
    with pytest.raises(ConfigError, match=r"config\.source.*id=1.*there.*id=2.*here") as raised:
        claim(
            str(tmp_path),
            {**IDENTITY, "config": {**QUESTION, "source": "https://u:secret@host/a?id=2"}},
        )
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("name", ["data_fingerprint", "checkpoint_fingerprint"])
def test_finished_results_of_changed_inputs_are_refused_naming_both(
    tmp_path: Path, name: str
) -> None:
    claim(str(tmp_path), IDENTITY)
    write_result(str(tmp_path))
    with pytest.raises(ConfigError, match=rf"{name}: '.*' there, 'ccc' here.*another `out`"):
        check_finished(str(tmp_path), QUESTION, lambda: inputs(**{name: "ccc"}))


def test_inputs_that_are_gone_leave_finished_results_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    claim(str(tmp_path), IDENTITY)

    def gone() -> Mapping[str, str | None]:
        raise StorageError("no such checkpoint")

    with caplog.at_level(logging.WARNING):
        check_finished(str(tmp_path), QUESTION, gone)
    assert "no such checkpoint" in caplog.text


@pytest.mark.parametrize("checkpoint", ["run", None])
def test_results_of_before_a_setting_existed_are_those_without_it(
    tmp_path: Path, checkpoint: str | None
) -> None:
    config = FinetuneConfig(
        task=TaskConfig(source="a.csv", name="esol"), out="out", checkpoint=checkpoint
    )
    note = {"config": question(config), "data_fingerprint": "d"}
    before = json.loads(json.dumps(note))
    del before["config"]["finetune"]["descriptors"]
    for name in ("censored", "relation_column", "classes", "replicates"):
        del before["config"]["task"][name]
    for name in ("environment_bins", "descriptor_head"):
        del before["config"]["model"][name]
    claim(str(tmp_path), before)
    claim(str(tmp_path), note)
    write_result(str(tmp_path))
    changed = dataclasses.replace(config, finetune=FinetuneSettings(descriptors=True))
    with pytest.raises(ConfigError, match=r"finetune\.descriptors: False there, True here"):
        claim(str(tmp_path), {**note, "config": question(changed)})


def test_raw_molecules_are_prepared_with_the_bounds_that_the_task_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[PrepareConfig] = []
    monkeypatch.setattr(molecules_module, "prepare", lambda config, **_: given.append(config))
    for changes in ({}, {"censored": True}, {"censored": True, "relation_column": "part"}):
        config = finetuning(tmp_path, columns=("y",), **changes)
        prepare_task(dataclasses.replace(config, checkpoint=None), None)
    found = [(one.censored_labels, one.relation_column) for one in given]
    assert found == [(False, None), (True, None), (True, "part")]


def test_raw_molecules_are_prepared_with_the_classes_of_the_task_which_are_its_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[PrepareConfig] = []
    monkeypatch.setattr(molecules_module, "prepare", lambda config, **_: given.append(config))
    source = tmp_path / "table.csv"
    source.write_text("smiles,y\nCCO,low\nC,High\n")
    common = {"name": "mine", "source": str(source), "columns": ("y",)}
    for classes, labels in (
        ((), ("y",)),
        (("low", "high"), ("y",)),
        (("low", "mid", "high"), ("y=low", "y=mid", "y=high")),
    ):
        task = TaskConfig(**common, classes=classes, kind=TaskKind.CLASSIFICATION)  # type: ignore[arg-type]
        assert task.resolve().columns == labels
        prepare_task(FinetuneConfig(task=task, out=str(tmp_path / "out")), None)
        assert (given[-1].label_columns, given[-1].classes) == (("y",), classes)


def test_a_table_without_any_of_the_classes_is_found_before_ray_is_started(
    tmp_path: Path, no_ray: None
) -> None:
    source = tmp_path / "table.csv"
    source.write_text("smiles,y\nCCO,Active\nC,Inactive\n")
    task = TaskConfig(
        name="mine",
        source=str(source),
        columns=("y",),
        classes=("yes", "no"),
        kind=TaskKind.CLASSIFICATION,
    )
    message = "no row has one of the classes yes, no .*, which hold Active, Inactive. Name the cl"
    with pytest.raises(DataError, match=message):
        finetune_module.finetune(FinetuneConfig(task=task, out=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("kind", "num_unreadable", "told"),
    [
        (TaskKind.REGRESSION, 7, True),
        (TaskKind.REGRESSION, 0, False),
        (TaskKind.CLASSIFICATION, 7, False),
    ],
)
def test_labels_that_may_be_bounds_are_told_where_they_could_be_used(
    caplog: pytest.LogCaptureFixture, kind: TaskKind, num_unreadable: int, told: bool
) -> None:
    config = TaskConfig(name="own", source="a.csv", columns=("y",), kind=kind)
    found: Any = SimpleNamespace(bounds=None, num_unreadable=num_unreadable)
    downstream._tell_of_bounds(config, config.resolve(), found)
    assert ("7 labels of a.csv are no numbers" in caplog.text) == told
    assert ("task.censored=true" in caplog.text) == told


def test_raw_molecules_get_the_form_of_pretraining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(finetuning(tmp_path, columns=("y",)), checkpoint=None)
    given: list[PrepareConfig] = []
    monkeypatch.setattr(molecules_module, "prepare", lambda config, **_: given.append(config))
    prepare_task(config, MoleculeForm(explicit_hydrogens=True, salts="reject"))
    prepare_task(config, None)
    forms = [
        (one.featurize.explicit_hydrogens, one.featurize.salts, one.featurize.max_atoms)
        for one in given
    ]
    assert forms == [(True, "reject", 256), (False, "keep", 256)]


def test_a_prepared_source_of_another_form_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{}")
    manifest = SimpleNamespace(options={"featurize": {"explicit_hydrogens": True}})
    monkeypatch.setattr(molecules_module, "load_manifest", lambda uri: manifest)
    task = TaskConfig(
        name="mine", source=str(tmp_path / "data"), columns=("y",), kind=TaskKind.REGRESSION
    )
    config = FinetuneConfig(task=task, out=str(tmp_path / "out"))
    prepare_task(config, None)
    prepare_task(config, MoleculeForm(explicit_hydrogens=True))
    assert not caplog.records
    prepare_task(config, MoleculeForm())
    assert "(featurize.explicit_hydrogens False and True)" in caplog.text


def test_distances_alone_are_refused_where_there_are_none_and_told_where_some_lack(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = finetuning(tmp_path)
    distances = FinetuneSettings(relations="3d")
    alone = dataclasses.replace(config, finetune=distances)
    searched = SweepConfig(
        task=config.task, out="o", search=SearchSpace(choices={"relations": ("2d", "3d")})
    )
    never = SweepConfig(
        task=config.task,
        out="o",
        finetune=distances,
        search=SearchSpace(choices={"relations": ("2d", "2d+3d")}),
    )

    def molecules(*has_coordinates: bool) -> Any:
        """As far as they are looked at."""

        class Molecules(SimpleNamespace):
            def __len__(self) -> int:
                return len(has_coordinates)

        return Molecules(has_coordinates=np.array(has_coordinates), mol_ids=("a", "b", "c"))

    for one in (alone, searched):
        with pytest.raises(
            DataError, match=r"relations=3d: none of the 3 molecules .*\(task\.conf"
        ):
            require_coordinates(one, molecules(False, False, False))
        require_coordinates(one, molecules(True, True, True))
    for one in (config, never):
        require_coordinates(one, molecules(False, False, False))
    assert not caplog.records
    require_coordinates(alone, molecules(True, False, False))
    assert "2 of 3 molecules have no coordinates, such as 'b'" in caplog.text
