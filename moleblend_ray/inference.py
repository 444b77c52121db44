"""SMILES to vectors and predictions in this process, for notebooks and services.

:func:`moleblend_ray.embed` and :func:`moleblend_ray.predict` do the same for whole libraries, on Ray: both ways featurize alike and run the
same code, so a molecule gets the same numbers (up to rounding: what shares a batch with it differs).
"""

from __future__ import annotations

import numbers
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from moleblend_ray.checks import check_all
from moleblend_ray.chemistry.config import (
    MAX_ATOMS,
    MAX_CONFORMERS,
    ConformerConfig,
    FeaturizeConfig,
)
from moleblend_ray.chemistry.records import SmilesText
from moleblend_ray.data.dataset.molecule_form import MoleculeForm
from moleblend_ray.data.preparation.shard_writer import Featurized, featurize_records
from moleblend_ray.data.sources.records import RawRecord
from moleblend_ray.errors import ConfigError, DataError
from moleblend_ray.evaluation.prediction.embedding import Embedder
from moleblend_ray.evaluation.prediction.encoders import load_encoder
from moleblend_ray.evaluation.prediction.ensemble import load_members
from moleblend_ray.evaluation.prediction.panel import Panel, build_predictor
from moleblend_ray.evaluation.prediction.prediction import Predictor
from moleblend_ray.evaluation.settings import COVERAGE
from moleblend_ray.model.batch import MoleculeBatch
from moleblend_ray.settings import typed

_NO_LABELS: Final = np.empty(0)

_NAMED: Final = 5
"""Molecules that an error names; the others it counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoleculeEncoder:
    """A pretrained or fine-tuned encoder that takes SMILES."""

    embedder: Embedder
    """The model and where it runs."""

    @classmethod
    def from_pretrained(
        cls,
        uri: str | os.PathLike[str],
        *,
        device: str | torch.device = "cpu",
        batch_size: int | None = None,
    ) -> MoleculeEncoder:
        """The encoder of a pretraining run, one of its checkpoints, an exported model, a file of official parameters (.pt, .npz) or
        a fine-tuned model, by path or URI.

        ``batch_size`` molecules are computed at once (None: 64 on a CPU, 1,024 on a GPU). A CheckpointError if ``uri`` holds no model, a ConfigError for a device that is
        not there or another wrong argument.
        """
        asked = _Asked(batch_size=batch_size)
        place = _usable(device)
        (name,) = _locations("uri", [uri])
        start, fine_tuned = load_encoder(name)
        embedder = Embedder.build(
            start,
            fine_tuned,
            uri=name,
            fingerprint=start.fingerprint or "",
            batch_size=asked.batch_size,
            device=place,
        )
        return cls(embedder=embedder)

    @property
    def dim(self) -> int:
        """Length of a vector (D)."""
        return self.embedder.model.config.dim

    def encode(
        self,
        smiles: Iterable[str | None],
        *,
        conformers: bool | None = None,
        invalid: Literal["raise", "nan"] = "raise",
        max_atoms: int = MAX_ATOMS,
    ) -> NDArray[np.float32]:
        """(M, D) the state of each molecule's graph token, in the order of ``smiles`` (M texts: a list, an array, a column of a table).

        ``conformers`` generates 3D coordinates (ETKDGv3, MMFF94; the same ones each time); without them, and where they cannot be made,
        the encoder sees 2D relations alone. None: as the model was fine-tuned; for a pretrained one, generate them. A model that was
        fine-tuned on distances alone needs them: a ConfigError without, and a molecule of which they cannot be made is ``invalid``.

        ``invalid``: what becomes of a SMILES that cannot be read or has more than ``max_atoms`` atoms (hydrogens apart), or is missing:
        ``raise`` a DataError that names it, or give it a row of ``nan``.
        """
        check_all(
            (invalid in ("raise", "nan"), f"invalid: expected raise or nan, found {invalid!r}")
        )
        given = _listed(smiles)
        found = self._featurized(given, conformers, max_atoms)
        if invalid == "raise":
            _require_all(found, given)
        vectors = np.full((len(given), self.dim), np.nan, dtype=np.float32)
        if len(found.molecules):
            part = self.embedder.part(found.molecules)
            flat = part["embedding"].combine_chunks().flatten().to_numpy()
            vectors[part["source_row"].to_numpy()] = flat.reshape(-1, self.dim)
        return vectors

    def batch(
        self,
        smiles: Iterable[str],
        *,
        conformers: bool | None = None,
        max_atoms: int = MAX_ATOMS,
    ) -> MoleculeBatch:
        """The molecules as tensors, in the order of ``smiles`` (M texts, at least one), for a training loop of your own:
        ``mb.load_model(uri).embed(batch)`` is (M, D), with gradients.

        The tensors are on the encoder's device. ``conformers`` and ``max_atoms`` are those of :meth:`encode`; a DataError names
        the SMILES that are no molecules.
        """
        given = _listed(smiles)
        if not given:
            raise DataError(
                "expected a list of SMILES, found an empty one: a batch has at least one molecule"
            )
        found = self._featurized(given, conformers, max_atoms)
        _require_all(found, given)
        return MoleculeBatch.from_table(found.molecules, self.embedder.device)

    def _featurized(
        self, smiles: Sequence[Any], conformers: bool | None, max_atoms: int
    ) -> Featurized:
        check_all(
            (
                conformers in (None, False, True),
                f"conformers: expected True, False or None (each molecule has one), found {conformers!r}",
            )
        )
        count = self.embedder.conformers if conformers is None else int(bool(conformers))
        self.embedder.require_coordinates(count)
        return _featurize(smiles, count, self.embedder, max_atoms)


@dataclass(frozen=True, kw_only=True, slots=True)
class PropertyPredictor:
    """One fine-tuned model, or several, which take SMILES. Those of one task are an ensemble, and several tasks a panel."""

    predictor: Predictor | Panel
    """The models and how they are asked."""

    @classmethod
    def from_pretrained(
        cls,
        models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        conformers: int | None = None,
        interval: float | None = COVERAGE,
        device: str | torch.device = "cpu",
        batch_size: int | None = None,
    ) -> PropertyPredictor:
        """The fine-tuned models of folders (``models/seed-N``), or of all seeds of finished fine-tunings, sweeps and refits, of one task or
        several, by path or URI.

        Predictions are means over models and ``conformers`` (0: without coordinates; None: as many as the models were fine-tuned with,
        none for models that see 2D relations alone); ``batch_size`` conformers are computed at once (None: 64 on a CPU, 1,024 on a GPU). Intervals around predicted
        numbers, and sets of classes, hold the share ``interval`` of labels (above 0 and below 1; None: neither). A CheckpointError if there is no
        model, a ConfigError if two of one task answer different questions, if only some were fine-tuned without coordinates and ``conformers`` is
        None, for a device that is not there or another wrong argument.
        """
        given = _locations("models", models)
        if isinstance(conformers, bool):
            conformers = int(conformers)
        asked = _Asked(conformers=conformers, interval=interval, batch_size=batch_size)
        place = _usable(device)
        predictor = build_predictor(
            load_members(given),
            conformers=asked.conformers,
            threshold=None,
            interval=asked.interval,
            batch_size=asked.batch_size,
            device=place,
        )
        return cls(predictor=predictor)

    def predict(
        self,
        smiles: Iterable[str | None],
        *,
        atom_contributions: bool = False,
        max_atoms: int = MAX_ATOMS,
    ) -> pa.Table:
        """One row per SMILES, in their order (``.to_pandas()`` makes a data frame of it).

        ``smiles`` is as given (null if it is missing); ``rejected`` says why there is no prediction (null: there is one). Then the columns that ``moleblend predict``
        writes: ``prediction:NAME`` in the property's unit or as a probability, ``lower:NAME`` and ``upper:NAME`` of a number's interval,
        ``p0:NAME`` and ``p1:NAME``, the p-values of classes, and ``classes:NAME``, those that the molecule goes with,
        ``class:COLUMN``, the most probable class of a column of more than two,
        ``std:NAME`` over models, ``conformer_std:NAME`` over several conformers, ``similarity`` to the nearest training molecule and ``in_domain``.
        Of several tasks NAME is the task, or ``task/column`` of one with several columns, and the last two are ``similarity:TASK`` and
        ``in_domain:TASK``.

        ``atom_contributions`` adds ``atom_contributions:NAME`` and ``atom_contributions_std:NAME`` as ``moleblend predict`` does, lists of the
        atoms in the order of ``canonical_smiles``, which follows ``smiles``. This takes about as many times longer as a molecule has
        atoms.
        """
        asked = _listed(smiles)
        predictor = self.predictor.with_contributions(asked=atom_contributions)
        found = _featurize(asked, predictor.conformers, predictor, max_atoms)
        part = predictor.part(found.molecules)
        row_of = np.full(len(asked), -1, dtype=np.int64)
        row_of[part["source_row"].to_numpy()] = np.arange(len(part))
        rows = pa.array(row_of, mask=row_of < 0)
        unwanted = ["mol_id", "source_row", *([] if atom_contributions else ["smiles"])]
        answers = part.drop_columns(unwanted).take(rows)
        reasons: list[str | None] = [None] * len(asked)
        for row in found.quarantine.to_pylist():
            reasons[row["source_row"]] = f"{row['reason']}: {row['detail']}"
        texts = [_encodable(text) if isinstance(text, str) else None for text in asked]
        table = pa.table(
            {"smiles": pa.array(texts, pa.string()), "rejected": pa.array(reasons, pa.string())}
        )
        for field, column in zip(answers.schema, answers.columns, strict=True):
            name = "canonical_smiles" if field.name == "smiles" else field.name
            table = table.append_column(field.with_name(name), column)
        return table


@typed
@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """How a model is to be asked; a ConfigError for values of other types and for those that make no sense."""

    conformers: int | None = None
    interval: float | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_all(
            (
                self.conformers is None or 0 <= self.conformers <= MAX_CONFORMERS,
                f"conformers: expected 0 to {MAX_CONFORMERS}, found {self.conformers}",
            ),
            (
                self.interval is None or 0 < self.interval < 1,
                f"interval: expected above 0 and below 1, found {self.interval}",
            ),
            (
                self.batch_size is None or self.batch_size >= 1,
                f"batch_size: expected at least 1, found {self.batch_size}",
            ),
        )


def _locations(name: str, given: Any) -> tuple[str, ...]:
    """One path or URI, or several, as text; ConfigError if there is none, or something else among them."""
    one = isinstance(given, str | os.PathLike) or not isinstance(given, Iterable)
    uris = (given,) if one else tuple(given)
    check_all(
        (len(uris) > 0, f"{name}: expected a path or URI, or several, found none"),
        *(
            (
                isinstance(uri, str | os.PathLike) and uri != "",
                f"{name}: expected a path or URI, found {uri!r}",
            )
            for uri in uris
        ),
    )
    return tuple(os.fspath(uri) for uri in uris)


def _usable(device: str | torch.device) -> torch.device:
    """The device; ConfigError if PyTorch cannot compute on it."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    # TypeError: no name at all; AssertionError: PyTorch without CUDA.
    except (TypeError, RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device: {str(device)!r} cannot be used here: {reason}") from error
    return found


def _listed(smiles: Iterable[Any]) -> list[Any]:
    """SMILES by their place, whatever index a data frame has; what is missing is whatever the container holds for it."""
    if isinstance(smiles, str | bytes):
        raise DataError(f"expected a list of SMILES, found one text: [{smiles!r}]")
    # Iterating over a table gives the names of its columns, and some names (C, N) are SMILES.
    if isinstance(smiles, Mapping) or hasattr(smiles, "columns"):
        names = getattr(smiles, "column_names", getattr(smiles, "columns", smiles))
        raise DataError(
            f"expected a list of SMILES, found a table ({type(smiles).__name__}) with the columns "
            f"{[str(name) for name in names]}; give the column that holds them"
        )
    try:
        items = iter(smiles)
    except TypeError as error:
        raise DataError(f"expected a list of SMILES, found {smiles!r}") from error
    listed = [item.as_py() if isinstance(item, pa.Scalar) else item for item in items]
    for place, item in enumerate(listed):
        if not _is_text_or_missing(item):
            raise DataError(
                f"expected SMILES as texts, found {type(item).__name__} at {place}: {reprlib.repr(item)}. Of a molecule of RDKit take "
                "Chem.MolToSmiles(molecule), of bytes their text: item.decode()"
            )
    return listed


def _is_text_or_missing(item: Any) -> bool:
    """Whether it is a text, or what tables hold where one is missing: None, a number, or what differs from itself (NaN, NaT)."""
    if item is None or isinstance(item, str | numbers.Number):
        return True
    try:
        return bool(item != item)
    except TypeError:  # pandas.NA, of which nobody knows
        return True
    except ValueError:  # an array
        return False


def _encodable(text: str) -> str:
    """The text with an escape for each half of a surrogate pair, as broken JSON has them: a table cannot hold these."""
    return text.encode(errors="backslashreplace").decode()


def _featurize(
    smiles: Sequence[Any], conformers: int, model: Embedder | Predictor | Panel, max_atoms: int
) -> Featurized:
    """The molecules as ``model`` takes them, rows of a shard, and those that were turned away; ``source_row`` is the place
    in ``smiles``."""
    records = [
        RawRecord(
            row=row,
            mol_id=None,
            content=SmilesText(text),
            labels=_NO_LABELS,
            unreadable=(),
            excerpt=_encodable(str(text)),
        )
        for row, text in enumerate(smiles)
    ]
    config = FeaturizeConfig(
        **asdict(model.form or MoleculeForm()),
        max_atoms=max_atoms,
        require_coordinates=model.needs_coordinates,
        conformers=ConformerConfig.of_count(conformers),
    )
    return featurize_records(records, "smiles", (), config)


def _require_all(found: Featurized, smiles: Sequence[Any]) -> None:
    """DataError that names those ``smiles`` that are no molecules."""
    rejected = found.quarantine.to_pylist()
    if not rejected:
        return
    named = "; ".join(
        f"{row['source_row']}: {smiles[int(str(row['source_row']))]!r} ({row['reason']}: {row['detail']})"
        for row in rejected[:_NAMED]
    )
    more = f" and {len(rejected) - _NAMED} more" if len(rejected) > _NAMED else ""
    raise DataError(
        f"{len(rejected)} of {len(smiles)} SMILES are no molecules for this encoder: {named}{more}. Leave them out, or take "
        'rows of nan for them with encode(..., invalid="nan")'
    )
