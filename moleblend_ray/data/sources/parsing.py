"""Chunks -> records with identifiers and labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from moleblend_ray.chemistry.composition import formula_of_molblock, formula_of_smiles
from moleblend_ray.chemistry.records import MolBlock, SmilesText
from moleblend_ray.chemistry.rejection import Rejection, RejectionCode
from moleblend_ray.chemistry.xyz import bonded_geometry, parse_xyz
from moleblend_ray.data.files import storage
from moleblend_ray.data.sources.cells import (
    count_molblocks,
    read_censored,
    read_classes,
    read_labels,
    relation_of,
    sd_properties,
    sd_text,
    smiles_and_name,
)
from moleblend_ray.data.sources.parquet import parse_parquet
from moleblend_ray.data.sources.reading import Item, items_of_payload
from moleblend_ray.data.sources.records import EXCERPT_CHARACTERS, RawRecord, RowChunk, SourceLayout
from moleblend_ray.data.sources.rows import DELIMITERS, csv_records, fields, without_empty_end
from moleblend_ray.data.sources.text import Beginning, decode, lines_of, sd_records

_NO_ROW: Final = "not a row: a quote is not closed, or a carriage return stands outside quotes"


def parse_chunk(chunk: RowChunk, layout: SourceLayout) -> Iterator[RawRecord]:
    """The chunk's records, ``chunk.num_rows`` of them, in order."""
    if layout.file.format == "parquet":
        return parse_parquet(chunk, layout)
    return parse_items(_items(chunk, layout), layout, chunk.first_row)


def _items(chunk: RowChunk, layout: SourceLayout) -> Iterable[Item]:
    if not chunk.is_text:
        return items_of_payload(chunk.payload)
    # None is too large, or the chunk would not be a text.
    max_bytes = len(chunk.payload)
    if layout.file.format == "sdf":
        return map(Item, sd_records([chunk.payload], max_bytes))
    if layout.file.format == "smi":
        return map(Item, lines_of([chunk.payload], max_bytes))
    return map(Item, csv_records([chunk.payload], DELIMITERS[layout.file.format], max_bytes))


def parse_items(items: Iterable[Item], layout: SourceLayout, first_row: int) -> Iterator[RawRecord]:
    """One record per item, numbered from ``first_row``."""
    parse = {"sdf": _parse_sdf, "smi": _parse_smiles, "xyz": _parse_xyz}.get(
        layout.file.format, _parse_row
    )
    for row, item in enumerate(items, first_row):
        if isinstance(item.text, Beginning):
            record = _too_large(row, item.text, layout)
        else:
            record = parse(row, item, layout)
        yield _excluded(record, layout) if item.excluded else record


def _too_large(row: int, beginning: Beginning, layout: SourceLayout) -> RawRecord:
    detail = f"the record has {beginning.problem}"
    rejection = Rejection(code=RejectionCode.INVALID_RECORD, detail=detail)
    if layout.file.format != "sdf":
        return _rejected(row, rejection, decode(beginning), layout)
    text = sd_text(beginning)
    title, line_end, _ = text.partition("\n")
    mol_id = title.strip() if line_end and not layout.id_column else ""
    return _rejected(row, rejection, text, layout)._replace(mol_id=mol_id or None)


def _excluded(record: RawRecord, layout: SourceLayout) -> RawRecord:
    assert layout.file.exclusions is not None
    detail = f"listed in {storage.name_of(layout.file.exclusions)}, published with the collection"
    return record._replace(content=Rejection(code=RejectionCode.EXCLUDED, detail=detail))


def _parse_sdf(row: int, item: Item, layout: SourceLayout) -> RawRecord:
    text = sd_text(item.text)
    block, properties = sd_properties(text)
    title = text.partition("\n")[0].strip()
    if several := _several_molblocks(text):
        # The title is that of the first, but of which one a property is, nobody knows.
        mol_id = "" if layout.id_column else title
        return _rejected(row, several, text, layout)._replace(mol_id=mol_id or None)
    mol_id = properties.get(layout.id_column, "") if layout.id_column else title
    excerpt = text[:EXCERPT_CHARACTERS]
    labels = _labels(layout, properties)
    return RawRecord(row, mol_id or None, MolBlock(block), excerpt=excerpt, **labels)


def _several_molblocks(text: str) -> Rejection | None:
    """Why an SD record is rejected that holds more than one molecule."""
    found = count_molblocks(text)
    if found < 2:
        return None
    detail = f"{found} molblocks in one record: the line $$$$ after each molecule is missing"
    return Rejection(code=RejectionCode.INVALID_RECORD, detail=detail)


def _parse_smiles(row: int, item: Item, layout: SourceLayout) -> RawRecord:
    smiles, name = smiles_and_name(item.text)
    if "\r" in smiles or "\r" in name:
        detail = "a carriage return within the line: several lines, perhaps"
        rejection = Rejection(code=RejectionCode.INVALID_RECORD, detail=detail)
        return _rejected(row, rejection, decode(item.text), layout)
    nothing = np.full(len(layout.labels), np.nan)
    excerpt = smiles[:EXCERPT_CHARACTERS]
    return RawRecord(row, name or None, SmilesText(smiles), nothing, (), excerpt)


def _parse_xyz(row: int, item: Item, layout: SourceLayout) -> RawRecord:
    text = decode(item.text)
    record = parse_xyz(text)
    if isinstance(record, Rejection):
        return _rejected(row, record, text, layout)
    labels = np.array([record.properties.get(name, np.nan) for name in layout.labels])
    smiles = record.smiles[0] if record.smiles else ""
    content = bonded_geometry(record) if not item.excluded else SmilesText(smiles)
    excerpt = smiles[:EXCERPT_CHARACTERS]
    return RawRecord(row, f"gdb_{record.number}", content, labels, (), excerpt)


def _rejected(row: int, rejection: Rejection, text: str, layout: SourceLayout) -> RawRecord:
    nothing = np.full(len(layout.labels), np.nan)
    return RawRecord(row, None, rejection, nothing, (), text[:EXCERPT_CHARACTERS])


def _parse_row(row: int, item: Item, layout: SourceLayout) -> RawRecord:
    cells = fields(item.text, DELIMITERS[layout.file.format])
    cells = cells and without_empty_end(cells, len(layout.columns))
    if cells is None or len(cells) != len(layout.columns):
        detail = _NO_ROW
        if cells is not None:
            detail = f"{len(cells)} fields where the header has {len(layout.columns)}"
        rejection = Rejection(code=RejectionCode.INVALID_RECORD, detail=detail)
        return _rejected(row, rejection, decode(item.text), layout)
    by_name = dict(zip(layout.columns, cells, strict=True))
    smiles = by_name[layout.smiles_column].strip() if layout.smiles_column else None
    mol_id = by_name[layout.id_column].strip() if layout.id_column else ""
    content: SmilesText | MolBlock | Rejection = SmilesText(smiles or "")
    if item.geometry is not None:
        content = _geometry(item.geometry, smiles, mol_id)
    elif smiles is None:
        detail = "the geometry ends before this row"
        content = Rejection(code=RejectionCode.INVALID_RECORD, detail=detail)
    excerpt = (smiles if smiles is not None else decode(item.text))[:EXCERPT_CHARACTERS]
    return RawRecord(row, mol_id or None, content, excerpt=excerpt, **_labels(layout, by_name))


def _labels(layout: SourceLayout, cells: Mapping[str, str]) -> dict[str, Any]:
    """The fields ``labels``, ``unreadable`` and ``bounds`` of a record."""
    if layout.class_labels:
        labels, unreadable = read_classes(layout.class_labels, cells)
        return {"labels": labels, "unreadable": unreadable}
    if not layout.censored:
        labels, unreadable = read_labels(layout.labels, cells)
        return {"labels": labels, "unreadable": unreadable}
    column = layout.relation_column
    relation = "=" if column is None else relation_of(cells.get(column, ""))
    texts = [cells.get(name, "") for name in layout.labels]
    labels, bounds, wrong = read_censored(texts, [relation] * len(texts))
    unreadable = tuple(name for name, bad in zip(layout.labels, wrong, strict=True) if bad)
    return {"labels": labels, "unreadable": unreadable, "bounds": bounds}


def _geometry(raw: bytes, smiles: str | None, mol_id: str) -> MolBlock | Rejection:
    """The molblock; a rejection if it is too large, or cannot be of the same molecule as its row."""
    if isinstance(raw, Beginning):
        detail = f"the geometry has {raw.problem}"
        return Rejection(code=RejectionCode.INVALID_RECORD, detail=detail)
    text = sd_text(raw)
    if several := _several_molblocks(text):
        return several
    block, _ = sd_properties(text)
    if smiles is not None:
        found, expected = formula_of_molblock(block), formula_of_smiles(smiles)
        if found is not None and found != expected:
            detail = f"the geometry has heavy atoms {found}, the SMILES {expected}"
            return Rejection(code=RejectionCode.GEOMETRY_MISMATCH, detail=detail)
        return MolBlock(block)
    title = text.partition("\n")[0].strip()
    if title and mol_id and title != mol_id:
        detail = f"the geometry is that of {title}, the row that of {mol_id}"
        return Rejection(code=RejectionCode.GEOMETRY_MISMATCH, detail=detail)
    return MolBlock(block)
