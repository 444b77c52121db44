"""Published collections that can be read as they are: known headers, and files that belong together.

================  ================================================================================================
PCQM4Mv2          ``data.csv.gz`` (or ``pcqm4m-v2.zip`` around it) with ``pcqm4m-v2-train.sdf``: the geometry of the
                  training molecules, which are the first rows, in their order (ogb.stanford.edu/docs/lsc/pcqm4mv2)
QM9               ``dsgdb9nsd.xyz.tar.bz2``, with ``uncharacterized.txt`` beside it
QM7, QM8, QM9     ``NAME.sdf`` with ``NAME.sdf.csv``, as in DeepChem's ``gdb9.tar.gz`` and ``qm9.zip``
MoleculeNet       the tables of DeepChem, known by their headers
================  ================================================================================================
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from moleblend_ray.chemistry.xyz import QM9_PROPERTIES
from moleblend_ray.data.files import storage
from moleblend_ray.data.sources.archives import text_format
from moleblend_ray.data.sources.records import SourceFile
from moleblend_ray.errors import ConfigError, DataError, without_credentials

logger = logging.getLogger(__name__)

EXCLUSIONS_NAME: Final = "uncharacterized.txt"

_PCQM_GEOMETRY: Final = "pcqm4m-v2-train.sdf"
_PCQM_TABLES: Final = ("data.csv", "data.csv.gz", "pcqm4m-v2.zip")
_DEEPCHEM_TAR: Final = re.compile(r"(gdb[789]|qm[789])\.(tar(\.\w+)?|tgz)\Z", re.I)


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedTable:
    """The meaning of the columns of a table that is recognised by its header."""

    header: tuple[str, ...]
    """Columns that it has."""
    has_more: bool = False
    """Whether it has more columns."""
    smiles_column: str = "smiles"
    id_column: str | None = None
    labels: tuple[str, ...] | None = None
    """None: all other numeric columns."""
    units: Mapping[str, str] = field(default_factory=dict)
    """Label -> unit."""


_QM9_UNITS: Final = {
    **QM9_PROPERTIES,
    **dict.fromkeys(("u0_atom", "u298_atom", "h298_atom", "g298_atom"), "kcal/mol"),
}

PUBLISHED_TABLES: Final = (
    PublishedTable(
        header=("idx", "smiles", "homolumogap"),
        id_column="idx",
        labels=("homolumogap",),
        units={"homolumogap": "eV"},
    ),
    PublishedTable(
        header=("mol_id", *_QM9_UNITS), has_more=True, id_column="mol_id", units=_QM9_UNITS
    ),
    # MoleculeNet, after the files of deepchemdata.s3-us-west-1.amazonaws.com/datasets.
    PublishedTable(header=("num", "name", "p_np", "smiles"), id_column="num", labels=("p_np",)),
    PublishedTable(
        header=("mol", "CID", "Class", "Model", "pIC50"),
        has_more=True,
        smiles_column="mol",
        id_column="CID",
        labels=("Class", "pIC50"),
    ),
    PublishedTable(header=("smiles", "activity", "HIV_active"), labels=("HIV_active",)),
    PublishedTable(
        header=("CMPD_CHEMBLID", "exp", "smiles"), id_column="CMPD_CHEMBLID", labels=("exp",)
    ),
    PublishedTable(
        header=("Compound ID", "measured log solubility in mols per litre", "smiles"),
        has_more=True,
        id_column="Compound ID",
        labels=("measured log solubility in mols per litre",),
        units={"measured log solubility in mols per litre": "log10(mol/L)"},
    ),
    PublishedTable(
        header=("iupac", "smiles", "expt", "calc"),
        id_column="iupac",
        labels=("expt",),
        units={"expt": "kcal/mol"},
    ),
    PublishedTable(
        header=("NR-AR", "SR-p53", "mol_id", "smiles"), has_more=True, id_column="mol_id"
    ),
    PublishedTable(
        header=("MUV-466", "MUV-859", "mol_id", "smiles"), has_more=True, id_column="mol_id"
    ),
)


def published_table(columns: Sequence[str]) -> PublishedTable | None:
    """The known table with these columns; None if there is none."""
    present = set(columns)
    for table in PUBLISHED_TABLES:
        known = set(table.header)
        if known <= present if table.has_more else known == present:
            return table
    return None


def associate(files: Sequence[SourceFile], exclusions: Sequence[str]) -> list[SourceFile]:
    """The files, with each geometry attached to its table, in the order of the tables.

    ``exclusions`` are the URIs of lists of molecules that should not be used (``EXCLUSIONS_NAME``).
    """
    tables = _Tables.of(files)
    geometries: dict[SourceFile, SourceFile] = {}
    for geometry in files:
        if geometry.format != "sdf" or geometry.geometry is not None:
            continue
        table = tables.of_geometry(geometry)
        if table is not None:
            other = geometries.setdefault(table, geometry)
            if other is not geometry:
                raise ConfigError(
                    f"source: {other.uri} and {geometry.uri} both look like the geometry of {table.uri}; expected one. "
                    "Leave the other out."
                )
    attached = set(geometries.values())
    found = [
        _joined(file, geometries[file]) if file in geometries else file
        for file in files
        if file not in attached
    ]
    return _with_exclusions(found, exclusions)


def pair_in_archive(file: SourceFile, names: Sequence[str] | None) -> SourceFile | None:
    """An archive of ``NAME.sdf`` and ``NAME.sdf.csv`` as a table with geometry; None if it is not such an archive.

    ``names`` are the names of its members, None if they cannot be listed without reading the archive.
    """
    if file.members != "*":
        return None
    if names is None:
        if not _DEEPCHEM_TAR.search(storage.name_of(file.uri)):
            return None
        return _joined(_part(file, "csv", "*.sdf.csv"), _part(file, "sdf", "*.sdf"))
    tables = [name for name in names if name.lower().endswith(".sdf.csv")]
    molecules = [name for name in names if text_format(name) is not None]
    if len(tables) != 1 or set(molecules) != {tables[0], tables[0][:-4]}:
        return None
    return _joined(_part(file, "csv", "*.sdf.csv"), _part(file, "sdf", "*.sdf"))


def _part(file: SourceFile, form: str, members: str) -> SourceFile:
    return replace(file, format=form, members=members)  # type: ignore[arg-type]


class _Tables(NamedTuple):
    """Files to which geometries may belong. A source may have 100,000 SD files, and each is looked up here."""

    by_uri: Mapping[str, SourceFile]
    """Every file."""
    of_pcqm: Sequence[SourceFile]
    """Tables with the name of PCQM4Mv2's."""

    @classmethod
    def of(cls, files: Sequence[SourceFile]) -> _Tables:
        """Those among ``files``; of members of one archive, the first."""
        of_pcqm = [
            file
            for file in files
            if storage.name_of(file.uri).lower() in _PCQM_TABLES and file.format == "csv"
        ]
        return cls({file.uri: file for file in reversed(files)}, of_pcqm)

    def of_geometry(self, geometry: SourceFile) -> SourceFile | None:
        """The table that an SD file is the geometry of; None if it is one of no table."""
        name = storage.name_of(geometry.uri.partition("!")[0]).lower()
        if name.startswith(_PCQM_GEOMETRY):
            return self._of_pcqm_geometry(geometry)
        stem = geometry.uri.removesuffix(".gz")
        return self.by_uri.get(f"{stem}.csv") or self.by_uri.get(f"{stem}.csv.gz")

    def _of_pcqm_geometry(self, geometry: SourceFile) -> SourceFile | None:
        if len(self.of_pcqm) > 1:
            shown = " and ".join(table.uri for table in self.of_pcqm)
            raise ConfigError(
                f"source: {geometry.uri} is the geometry of PCQM4Mv2, but {shown} both look like its "
                "table. Leave one of them out."
            )
        if not self.of_pcqm:
            logger.warning(
                "%s is read without labels and validation molecules: data.csv.gz or pcqm4m-v2.zip is "
                "not among the sources",
                without_credentials(geometry.uri),
            )
        return self.of_pcqm[0] if self.of_pcqm else None


def _joined(table: SourceFile, geometry: SourceFile) -> SourceFile:
    same = table.uri == geometry.uri
    return replace(
        table,
        geometry=geometry,
        size=table.size + (0 if same else geometry.size),
        probe=table.probe if same else _digest(table.probe, geometry.probe),
    )


def _with_exclusions(files: list[SourceFile], exclusions: Sequence[str]) -> list[SourceFile]:
    if not exclusions:
        return files
    takers = [file for file in files if _is_qm9(file)]
    if len(exclusions) > 1 or not takers:
        logger.warning(
            "%s is left out: it goes with one QM9 among the sources, which must not have two lists",
            without_credentials(exclusions[0]),
        )
        return files
    probe = storage.sha256_bytes(storage.read_bytes(exclusions[0]))
    return [
        replace(file, exclusions=exclusions[0], probe=_digest(file.probe, probe))
        if file in takers
        else file
        for file in files
    ]


def _is_qm9(file: SourceFile) -> bool:
    """Whether QM9's list of exclusions applies to this file."""
    names = storage.name_of(file.uri) + (file.geometry.uri if file.geometry else "")
    return file.format == "xyz" or (
        file.geometry is not None and re.search("gdb9|qm9", names, re.I) is not None
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def read_exclusions(uri: str) -> frozenset[int]:
    """Numbers (from 1) of the QM9 molecules whose relaxed geometry does not have the bonds of the original SMILES.

    The list (``uncharacterized.txt`` of QM9) has introductory text, a line per molecule that begins with its number,
    in ascending order, and a last line with their count.
    """
    numbers: list[int] = []
    count: int | None = None
    for line in storage.read_bytes(uri).decode("utf-8", "replace").splitlines():
        word = line.split(None, 1)[:1]
        if not word or not word[0].isdecimal():
            continue
        if numbers and int(word[0]) <= numbers[-1]:
            count = int(word[0])
            break
        numbers.append(int(word[0]))
    if not numbers or count not in (None, len(numbers)):
        raise DataError(
            f"{uri}: {len(numbers)} ascending numbers of molecules and a count of {count}; it is no list of "
            "QM9's uncharacterized molecules, or is damaged. Fetch it again, or leave it out of the source."
        )
    return frozenset(numbers)
