"""The README's Python example runs as printed."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
SMILES = ["CCO", "c1ccccc1O", "CC(=O)Nc1ccc(O)cc1", "CCN(CC)CC", "OCC1OC(O)C(O)C(O)C1O"]


def python_examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.ray
@pytest.mark.slow
def test_python_example_of_the_readme_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    monkeypatch.chdir(tmp_path)
    with open("molecules.csv", "w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["smiles", "y"])
        rows.writerows([f"{'C' * (i % 7)}{smiles}", i / 10] for i, smiles in enumerate(SMILES * 12))
        rows.writerow(["not a molecule", 0.0])
    (example,) = python_examples()

    names: dict[str, Any] = {}
    exec(compile(example, str(README), "exec"), names)

    prepared, run, vectors = names["prepared"], names["run"], names["vectors"]
    assert (prepared.rows_in, prepared.rows_quarantined) == (61, 1)
    assert run.steps == 10
    assert vectors.embeddings == 60
    # In this process the same numbers as on the cluster.
    part = pq.read_table(sorted(Path(vectors.out).rglob("part-*.parquet"))[0])
    with open("molecules.csv", newline="") as stream:
        smiles = [row["smiles"] for row in csv.DictReader(stream)]
    asked = [smiles[row] for row in part["source_row"].to_pylist()]
    expected = np.array(part["embedding"].to_pylist(), dtype=np.float32)
    assert expected.shape == (len(asked), vectors.dim)
    np.testing.assert_allclose(names["encoder"].encode(asked), expected, rtol=1e-3, atol=1e-4)
