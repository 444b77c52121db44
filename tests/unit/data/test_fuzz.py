"""Whatever a record contains, the job continues and every row is accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fuzzing import accounting_errors, molblock_inputs, smiles_inputs, write_sources
from rdkit import Chem, rdBase

from moleblend_ray.chemistry.binary import to_binary
from moleblend_ray.chemistry.features import graph_arrays, graph_arrays_by_getters
from moleblend_ray.data.dataset.manifest import load_manifest
from moleblend_ray.data.preparation.assembly import write_manifest
from moleblend_ray.data.preparation.claim import claim_output
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.shard_writer import convert_chunk
from moleblend_ray.data.sources import find_sources, inspect_sources, read_chunks


def test_damaged_and_hostile_records_are_all_accounted_for(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    rows = write_sources(source, 2000, seed=1)
    options = ConvertOptions(rows_per_chunk=400)
    sources = inspect_sources(find_sources(str(source)), options.columns)
    claim_output(str(out), sources, options)
    receipts = [
        convert_chunk(chunk, layout, sources.labels, options, str(out))
        for index, layout in enumerate(sources.layouts)
        for chunk in read_chunks(layout, index, options.rows_per_chunk)
    ]
    write_manifest(str(out), sources, options, receipts)
    assert accounting_errors(out, rows) == []
    counts = load_manifest(str(out)).counts
    # The corpus covers much: many records are still molecules, and the others are rejected for many reasons.
    assert counts.rows_out > 150
    assert len(counts.quarantined_by_reason) >= 6


@pytest.mark.parametrize("inputs", [smiles_inputs, molblock_inputs], ids=["smiles", "molblock"])
def test_damaged_molecules_have_the_codes_that_the_getters_give(
    inputs: Callable[..., Iterator[str]],
) -> None:
    parse = Chem.MolFromSmiles if inputs is smiles_inputs else Chem.MolFromMolBlock
    with rdBase.BlockLogs():
        parsed: Iterator[Chem.Mol | None] = (
            parse(text) for text in inputs(1500, seed=2) if len(text) < 5000 and text != "C\ud800C"
        )
        mols = [mol for mol in parsed if mol is not None and 0 < mol.GetNumAtoms() <= 600]
    assert len(mols) > 200
    for mol, found in zip(mols, graph_arrays([to_binary(mol) for mol in mols]), strict=True):
        expected = graph_arrays_by_getters(mol)
        for name, array in expected._asdict().items():
            np.testing.assert_array_equal(getattr(found, name), array, Chem.MolToSmiles(mol))
