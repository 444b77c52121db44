"""Two `prepare` of one output: the second learns what the first does, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from in_process import prepare_in_process

from moleblend_ray.config.cluster import ClusterConfig
from moleblend_ray.config.prepare import PrepareConfig
from moleblend_ray.data.dataset.lease import InUseError, Lease, leased
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.files import storage
from moleblend_ray.data.preparation.claim import claim_output
from moleblend_ray.data.preparation.exchange import Exchange, Unit
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.receipts import Receipt
from moleblend_ray.data.sources import find_sources, inspect_sources
from moleblend_ray.errors import ConfigError
from moleblend_ray.orchestration.preparation import exchange as exchange_module
from moleblend_ray.orchestration.preparation import prepare as module
from moleblend_ray.orchestration.preparation.conversion import Conversion
from moleblend_ray.orchestration.preparation.exchange import run_exchange


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    (tmp_path / "in.csv").write_text("smiles\nC\nCC\nCCC\n")
    return PrepareConfig(source=str(tmp_path / "in.csv"), out=str(tmp_path / "out"))


@pytest.fixture(autouse=True)
def without_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(module, "ray_session", fail)


def finish(config: PrepareConfig) -> None:
    """What another command does, from its claim to its manifest."""
    prepare_in_process(str(config.source), config.out, module._options(config, None))


def content_of(out: str) -> dict[str, bytes]:
    files = sorted(path for path in Path(out).rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_while_another_command_prepares_it_nothing_is_written(config: PrepareConfig) -> None:
    with leased(config.out):
        before = content_of(config.out)
        with pytest.raises(InUseError, match="another command works on"):
            module.prepare(config)
        assert content_of(config.out) == before


def test_what_another_command_finished_while_this_one_waited_is_already_prepared(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def after_another(out: str) -> Iterator[Lease]:
        finish(config)
        with leased(out) as lease:
            yield lease

    monkeypatch.setattr(module, "leased", after_another)
    summary = module.prepare(config)
    assert (summary.status, summary.rows_out) == ("already prepared", 3)
    assert not {name.split("/")[0] for name in content_of(config.out)} - {
        "train",
        "valid",
        "manifest.json",
    }


def test_an_output_of_another_data_set_is_refused_before_a_lease_is_written(
    config: PrepareConfig,
) -> None:
    options = ConvertOptions(rows_per_chunk=7)
    sources = inspect_sources(find_sources(*config.sources()), options.columns)
    claim_output(config.out, sources, options)
    before = content_of(config.out)
    with pytest.raises(ConfigError, match=r"begun otherwise.*options\.rows_per_chunk: there 7"):
        module.prepare(config)
    assert content_of(config.out) == before


class Lost:
    """A lease that another command has taken over."""

    def require(self) -> None:
        raise InUseError("taken over")


def test_conversion_ends_when_the_lease_is_lost(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ConvertOptions()
    sources = inspect_sources(find_sources(*config.sources()), options.columns)
    monkeypatch.setattr(Conversion, "_results", lambda *_: iter([{"failure": "not looked at"}]))
    with pytest.raises(InUseError, match="taken over"):
        Conversion(config, sources, options, {}).run(Anything(), Anything(), Lost())  # type: ignore[arg-type]


def test_an_exchange_ends_when_the_lease_is_lost(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [Unit("runs", 0), Unit("runs", 1)]
    monkeypatch.setattr(exchange_module, "_run_tasks", lambda *_: iter(units))
    monkeypatch.setattr(exchange_module, "ray", Anything())
    exchange = Exchange(
        out=config.out, source_uris=(), labels=(), descriptors=False, row_group_rows=8, shuffle=True,
        deduplicate=False, num_buckets=1, group_starts=(0,), content_digest="",
    )  # fmt: skip
    with pytest.raises(InUseError, match="taken over"):
        run_exchange(exchange, [units], ClusterConfig(), Anything(), Lost())  # type: ignore[arg-type]


def test_no_manifest_is_written_after_another_command_took_over(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> list[Receipt]:
        storage.write_json(f"{config.out}/leases/000002.json", {"token": "another"})
        return []

    monkeypatch.setattr(module, "ray_session", lambda _: nullcontext())
    monkeypatch.setattr(module, "Progress", lambda *_, **__: nullcontext(Anything()))
    monkeypatch.setattr(module, "require_room", lambda *_: None)
    monkeypatch.setattr(Conversion, "run", run)
    with pytest.raises(InUseError, match="has taken over"):
        module.prepare(config)
    assert not Path(config.out, "manifest.json").exists()


class Anything:
    """Has every method, which returns another one."""

    def __getattr__(self, name: str) -> Any:
        return Anything()

    def __call__(self, *_: object, **__: object) -> Any:
        return Anything()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "label 'a': 2 cells hold no number and count as missing"),
        (
            {"censored_labels": True},
            "label 'a': 1 cells hold neither a number nor a bound and count as missing",
        ),
        (
            {"censored_labels": True, "relation_column": "r"},
            "label 'a': 2 cells hold neither a number nor a bound and count as missing (or 'r' holds no relation for them, or "
            "another one)",
        ),
    ],
)
def test_cells_that_are_not_read_are_told_with_what_was_expected(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
    expected: str,
) -> None:
    (tmp_path / "in.csv").write_text("smiles,a,r\nC,>1,<\nCC,x,=\nCCC,2,=\n")
    config = PrepareConfig(
        source=str(tmp_path / "in.csv"),
        out=str(tmp_path / "out"),
        label_columns=("a",),
        **settings,
    )
    finish(config)
    module._log_outcome(load_manifest(config.out), config, wants_coordinates=False)
    assert expected in caplog.messages


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("x(\ny(\n", "2 of 2 rows are in the quarantine, not among the molecules (unparsable_smiles: 2); "),
        ("x(\ny(\nC\n", "2 of 3 rows are in the quarantine, not among the molecules (unparsable_smiles: 2); "),
        ("x(\nC\n", None),
    ],
)  # fmt: skip
def test_a_table_of_mostly_no_molecules_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: str, expected: str | None
) -> None:
    (tmp_path / "in.csv").write_text(f"smiles\n{rows}")
    config = PrepareConfig(source=str(tmp_path / "in.csv"), out=str(tmp_path / "out"))
    finish(config)
    module._log_outcome(load_manifest(config.out), config, wants_coordinates=False)
    told = [text for text in caplog.messages if "quarantine" in text]
    caplog.clear()
    assert module.prepare(config).all_rejected == ("C" not in rows)
    # A repeated command, which does nothing, says it again.
    assert told == [text for text in caplog.messages if "quarantine" in text]
    assert told == (
        [] if expected is None else [f"{expected}`moleblend data {config.out}` shows examples"]
    )
    # That each split is empty follows from it.
    assert ("split train has no molecules" in caplog.text) <= ("C" in rows)
