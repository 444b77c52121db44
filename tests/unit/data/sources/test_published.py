"""Published collections as they are downloaded: joined, labelled with units, checked and prepared."""

from __future__ import annotations

import bz2
import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rdkit import Chem

from moleblend_ray.chemistry.samples import SampleMolecule, make_samples
from moleblend_ray.chemistry.xyz import QM9_PROPERTIES
from moleblend_ray.data.dataset.manifest import Manifest
from moleblend_ray.data.preparation.assembly import write_manifest
from moleblend_ray.data.preparation.claim import claim_output
from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.preparation.shard_writer import convert_chunk
from moleblend_ray.data.preparation.split_file import read_split_file
from moleblend_ray.data.sources import (
    ColumnConfig,
    find_sources,
    inspect_sources,
    read_chunks,
)
from moleblend_ray.data.sources.published import associate, read_exclusions
from moleblend_ray.data.sources.records import SourceFile
from moleblend_ray.errors import ConfigError, DataError

NUM_MOLECULES = 12
NUM_WITH_GEOMETRY = 9


@pytest.fixture(scope="module")
def samples() -> list[SampleMolecule]:
    return list(make_samples(NUM_MOLECULES, num_processes=1))


def mol_of(sample: SampleMolecule) -> Chem.Mol:
    """The molecule of a sample, with its conformer."""
    mol = Chem.RWMol()
    for number, charge in zip(sample.atomic_numbers, sample.formal_charges, strict=True):
        atom = Chem.Atom(int(number))
        atom.SetFormalCharge(int(charge))
        mol.AddAtom(atom)
    kinds = {1: Chem.BondType.SINGLE, 2: Chem.BondType.DOUBLE, 3: Chem.BondType.TRIPLE}
    for begin_, end, order in sample.bonds.tolist():
        mol.AddBond(begin_, end, kinds[order])
    Chem.SanitizeMol(mol)
    conformer = Chem.Conformer(mol.GetNumAtoms())
    conformer.SetPositions(np.asarray(sample.positions, dtype=np.float64))
    conformer.Set3D(True)
    mol.AddConformer(conformer)
    return mol


def flat(smiles: str) -> str:
    """The SMILES without stereo, as a geometry may have more stereo than its SMILES."""
    mol = Chem.MolFromSmiles(smiles)
    Chem.RemoveStereochemistry(mol)
    return Chem.MolToSmiles(mol)


def sdf(samples: Sequence[SampleMolecule], titles: Sequence[str] | None = None) -> bytes:
    blocks = []
    for index, sample in enumerate(samples):
        mol = mol_of(sample)
        mol.SetProp("_Name", titles[index] if titles else "")
        blocks.append(Chem.MolToMolBlock(mol) + "$$$$\n")
    return "".join(blocks).encode()


def tar_of(files: dict[str, bytes], pack: Callable[[bytes], bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return pack(buffer.getvalue())


def convert(source: Path | str, out: Path, rows_per_chunk: int = 4) -> Manifest:
    """Run ``prepare`` in this process."""
    options = ConvertOptions(rows_per_chunk=rows_per_chunk, valid_fraction=0.0)
    sources = inspect_sources(find_sources(str(source)), options.columns)
    claim_output(str(out), sources, options)
    receipts = [
        convert_chunk(chunk, layout, sources.labels, options, str(out))
        for index, layout in enumerate(sources.layouts)
        for chunk in read_chunks(layout, index, rows_per_chunk)
    ]
    return write_manifest(str(out), sources, options, receipts)


def molecules(out: Path, manifest: Manifest, split: str = "train") -> pa.Table:
    return pa.concat_tables(
        [pq.read_table(out / shard.path) for shard in manifest.shards_of(split)]
    )


# --- PCQM4Mv2 ---------------------------------------------------------------------------------------


def pcqm_table(samples: Sequence[SampleMolecule]) -> bytes:
    rows = [
        f"{index},{sample.smiles},{sample.logp if index < NUM_MOLECULES - 2 else ''}\n"
        for index, sample in enumerate(samples)
    ]
    return gzip.compress(("idx,smiles,homolumogap\n" + "".join(rows)).encode())


def write_pcqm(folder: Path, samples: Sequence[SampleMolecule], geometry: bytes) -> Path:
    """The two files as published."""
    folder.mkdir(exist_ok=True)
    split = {
        "train": np.arange(NUM_WITH_GEOMETRY),
        "valid": np.array([9]),
        "test-dev": np.array([10]),
        "test-challenge": np.array([11]),
    }
    torch.save(split, folder / "split_dict.pt")
    with zipfile.ZipFile(folder / "pcqm4m-v2.zip", "w") as archive:
        archive.writestr("pcqm4m-v2/RELEASE_v1.txt", "")
        archive.writestr("pcqm4m-v2/raw/data.csv.gz", pcqm_table(samples))
        archive.write(folder / "split_dict.pt", "pcqm4m-v2/split_dict.pt")
    (folder / "split_dict.pt").unlink()
    packed = tar_of({"pcqm4m-v2-train.sdf": geometry}, gzip.compress)
    (folder / "pcqm4m-v2-train.sdf.tar.gz").write_bytes(packed)
    return folder


def test_pcqm4mv2_joins_geometry_with_labels_and_keeps_the_other_rows(
    tmp_path: Path, samples: list[SampleMolecule]
) -> None:
    source = write_pcqm(tmp_path / "raw", samples, sdf(samples[:NUM_WITH_GEOMETRY]))
    manifest = convert(source, tmp_path / "out")
    assert manifest.counts.rows_in == manifest.counts.rows_out == NUM_MOLECULES
    assert manifest.counts.with_coordinates == NUM_WITH_GEOMETRY
    assert [(label.name, label.unit, label.count) for label in manifest.labels] == [
        ("homolumogap", "eV", NUM_MOLECULES - 2)
    ]
    table = molecules(tmp_path / "out", manifest)
    assert table["mol_id"].to_pylist() == [str(index) for index in range(NUM_MOLECULES)]
    assert table["source_row"].to_pylist() == list(range(NUM_MOLECULES))
    found = table["smiles"].to_pylist()
    assert found[NUM_WITH_GEOMETRY:] == [s.smiles for s in samples[NUM_WITH_GEOMETRY:]]
    assert [flat(smiles) for smiles in found] == [flat(sample.smiles) for sample in samples]
    labels = table["label:homolumogap"].to_pylist()
    assert labels == [*(sample.logp for sample in samples[:10]), None, None]
    for index, positions in enumerate(table["positions"].to_pylist()):
        if index < NUM_WITH_GEOMETRY:
            np.testing.assert_allclose(
                np.sort(positions), np.sort(samples[index].positions.ravel()), atol=5e-5
            )
    splits = read_split_file(str(source / "pcqm4m-v2.zip")).by_row or {}
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": NUM_WITH_GEOMETRY,
        "valid": 1,
        "test-dev": 1,
        "test-challenge": 1,
    }


def test_pcqm4mv2_may_be_unpacked_and_each_file_is_a_source_alone(
    tmp_path: Path, samples: list[SampleMolecule]
) -> None:
    packed = write_pcqm(tmp_path / "packed", samples, sdf(samples[:NUM_WITH_GEOMETRY]))
    folder = tmp_path / "unpacked"
    (folder / "raw").mkdir(parents=True)
    (folder / "raw" / "data.csv.gz").write_bytes(pcqm_table(samples))
    (folder / "pcqm4m-v2-train.sdf").write_bytes(sdf(samples[:NUM_WITH_GEOMETRY]))
    both = convert(folder, tmp_path / "both")
    joined = molecules(tmp_path / "both", both)
    expected = molecules(tmp_path / "p", convert(packed, tmp_path / "p"))
    energies = ["conformer_energies"]  # NaN, which is not equal to NaN
    assert joined.drop_columns(energies).equals(expected.drop_columns(energies))
    table = convert(packed / "pcqm4m-v2.zip", tmp_path / "table")
    assert (table.counts.rows_in, table.counts.with_coordinates) == (NUM_MOLECULES, 0)
    alone = convert(packed / "pcqm4m-v2-train.sdf.tar.gz", tmp_path / "geometry")
    assert (alone.counts.rows_in, len(alone.labels)) == (NUM_WITH_GEOMETRY, 0)
    (folder / "pcqm4m-v2.zip").write_bytes((packed / "pcqm4m-v2.zip").read_bytes())
    with pytest.raises(ConfigError, match="both look like its table"):
        find_sources(str(folder))


def test_a_geometry_that_is_there_twice_is_told(
    tmp_path: Path, samples: list[SampleMolecule]
) -> None:
    source = write_pcqm(tmp_path, samples, sdf(samples[:NUM_WITH_GEOMETRY]))
    (source / "pcqm4m-v2-train.sdf").write_bytes(sdf(samples[:NUM_WITH_GEOMETRY]))
    with pytest.raises(
        ConfigError, match=r"train\.sdf and .*train\.sdf\.tar\.gz both look like the geometry of"
    ):
        find_sources(str(source))


class Looked(list[SourceFile]):
    """Files that count how often somebody looks at all of them."""

    looks = 0

    def __iter__(self) -> Iterator[SourceFile]:
        self.looks += 1
        return super().__iter__()


def test_many_sd_files_are_looked_up_in_time_that_grows_with_their_number() -> None:
    files = [
        SourceFile(uri=f"/tranches/{number:05d}.sdf.gz", format="sdf", size=1, probe="")
        for number in range(200)
    ]
    looked = Looked(files)
    assert associate(looked, []) == files
    assert looked.looks < 10


def test_a_geometry_of_another_molecule_goes_to_the_quarantine(
    tmp_path: Path, samples: list[SampleMolecule]
) -> None:
    order = [0, 1, 2, 4, 3, 5, 6, 7, 8]
    assert samples[3].smiles != samples[4].smiles
    geometry = sdf([samples[index] for index in order])
    manifest = convert(write_pcqm(tmp_path / "raw", samples, geometry), tmp_path / "out")
    assert manifest.counts.quarantined_by_reason == {"geometry_mismatch": 2}
    rejected = molecules(tmp_path / "out", manifest, "quarantine").to_pylist()
    assert [row["source_row"] for row in rejected] == [3, 4]
    assert rejected[0]["excerpt"] == samples[3].smiles
    assert "the geometry has heavy atoms C" in rejected[0]["detail"]


def test_geometries_without_a_line_between_them_are_those_of_no_row(
    tmp_path: Path, samples: list[SampleMolecule]
) -> None:
    last = NUM_WITH_GEOMETRY - 1
    geometry = sdf(samples[:last]).removesuffix(b"$$$$\n") + sdf(samples[last : last + 1])
    manifest = convert(write_pcqm(tmp_path / "raw", samples, geometry), tmp_path / "out")
    (rejected,) = molecules(tmp_path / "out", manifest, "quarantine").to_pylist()
    assert (rejected["source_row"], rejected["reason"]) == (last - 1, "invalid_record")
    assert rejected["excerpt"] == samples[last - 1].smiles
    assert rejected["detail"].startswith("2 molblocks in one record")
    assert manifest.counts.with_coordinates == last - 1


@pytest.mark.usefixtures("small_limit")
def test_a_geometry_that_is_too_large_costs_no_other_row(
    tmp_path: Path, samples: list[SampleMolecule]
) -> None:
    geometry = sdf(samples[:3]).removesuffix(b"$$$$\n") + b"x" * (1 << 20) + b"\n$$$$\n"
    geometry += sdf(samples[3:NUM_WITH_GEOMETRY])
    manifest = convert(write_pcqm(tmp_path / "raw", samples, geometry), tmp_path / "out")
    (rejected,) = molecules(tmp_path / "out", manifest, "quarantine").to_pylist()
    assert (rejected["source_row"], rejected["reason"]) == (2, "invalid_record")
    assert rejected["excerpt"] == samples[2].smiles
    assert rejected["detail"] == (
        "the geometry has 1.1 MiB, more than the 1 MiB that a record may have"
    )
    assert manifest.counts.rows_out == NUM_MOLECULES - 1
    assert manifest.counts.with_coordinates == NUM_WITH_GEOMETRY - 1


def test_a_geometry_that_does_not_belong_to_the_table_is_refused_before_anything_is_written(
    tmp_path: Path, samples: list[SampleMolecule]
) -> None:
    source = write_pcqm(tmp_path / "raw", samples, sdf(samples[1:]))
    with pytest.raises(DataError, match=r"sdf\.tar\.gz is no geometry of .*pcqm4m-v2\.zip.*Row 0"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_geometries_than_rows_are_damage(
    tmp_path: Path, samples: list[SampleMolecule]
) -> None:
    geometry = sdf([*samples, samples[0]])
    source = write_pcqm(tmp_path / "raw", samples, geometry)
    with pytest.raises(DataError, match="more records than its table has rows"):
        convert(source, tmp_path / "out")


def test_a_change_of_the_geometry_is_a_change_of_the_source(
    tmp_path: Path, samples: list[SampleMolecule]
) -> None:
    source = write_pcqm(tmp_path / "raw", samples, sdf(samples[:NUM_WITH_GEOMETRY]))
    (before,) = find_sources(str(source))
    write_pcqm(source, samples, sdf(samples[: NUM_WITH_GEOMETRY - 1]))
    (after,) = find_sources(str(source))
    assert before.uri == after.uri
    assert before.probe != after.probe


# --- QM9 --------------------------------------------------------------------------------------------


SMALL = ["C", "CO", "C1CN1", "NC=O", "CC#N", "c1cc[nH]c1", "OCC=O", "C[NH2+]CC([O-])=O"]


def qm9_files() -> dict[str, bytes]:
    """Files in the layout of dsgdb9nsd.xyz.tar.bz2, with geometries by RDKit and invented properties."""
    from rdkit.Chem import rdDistGeom

    files = {}
    for index, smiles in enumerate(SMALL, 1):
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        assert rdDistGeom.EmbedMolecule(mol, randomSeed=11) == 0
        values = [f"{index + place / 100:.2f}" for place in range(len(QM9_PROPERTIES))]
        atoms = [
            "\t".join([atom.GetSymbol(), *(f"{value:.10f}" for value in place), "0.1"])
            for atom, place in zip(mol.GetAtoms(), mol.GetConformer().GetPositions(), strict=True)
        ]
        lines = [str(mol.GetNumAtoms()), f"gdb {index}\t" + "\t".join(values), *atoms]
        lines += ["1.0\t2.0", f"{smiles}\t{Chem.MolToSmiles(Chem.RemoveHs(mol))}\t", "InChI\tInChI"]
        files[f"dsgdb9nsd_{index:06d}.xyz"] = ("\n".join(lines) + "\n").encode()
    return files


def uncharacterized(numbers: Sequence[int]) -> str:
    head = "\n".join(["=" * 40, "Molecules that failed the check", "", "Index  SMILES", "=" * 40])
    rows = "".join(f"   {number:6d}  C  C  C\n" for number in numbers)
    return f"{head}\n{rows}  {len(numbers)} compounds\n"


def test_qm9_as_published_has_geometry_bonds_labels_and_units(tmp_path: Path) -> None:
    source = tmp_path / "dsgdb9nsd.xyz.tar.bz2"
    source.write_bytes(tar_of(qm9_files(), bz2.compress))
    manifest = convert(source, tmp_path / "out", rows_per_chunk=3)
    assert manifest.counts.rows_out == manifest.counts.with_coordinates == len(SMALL)
    assert {label.name: label.unit for label in manifest.labels} == QM9_PROPERTIES
    table = molecules(tmp_path / "out", manifest)
    assert table["mol_id"].to_pylist() == [f"gdb_{index}" for index in range(1, len(SMALL) + 1)]
    assert table["smiles"].to_pylist() == [
        Chem.MolToSmiles(Chem.MolFromSmiles(smiles)) for smiles in SMALL
    ]
    assert table["label:A"].to_pylist()[0] == 1.0
    assert table["label:cv"].to_pylist()[2] == 3.14


@pytest.mark.usefixtures("small_limit")
def test_a_file_of_qm9_that_is_too_large_costs_no_other(tmp_path: Path) -> None:
    files = qm9_files()
    files["dsgdb9nsd_000003.xyz"] += b"x" * (3 << 20)
    source = tmp_path / "dsgdb9nsd.xyz.tar.bz2"
    source.write_bytes(tar_of(files, bz2.compress))
    manifest = convert(source, tmp_path / "out", rows_per_chunk=3)
    (rejected,) = molecules(tmp_path / "out", manifest, "quarantine").to_pylist()
    assert (rejected["source_row"], rejected["reason"]) == (2, "invalid_record")
    assert rejected["detail"] == (
        "the record has 3.1 MiB, more than the 1 MiB that a record may have"
    )
    assert rejected["excerpt"] == files["dsgdb9nsd_000003.xyz"][:200].decode()
    assert manifest.counts.rows_out == len(SMALL) - 1


def test_a_list_of_exclusions_beside_qm9_fills_the_quarantine(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "dsgdb9nsd.xyz.tar.bz2").write_bytes(tar_of(qm9_files(), bz2.compress))
    without = convert(folder, tmp_path / "without")
    (folder / "uncharacterized.txt").write_text(uncharacterized([2, 5]))
    assert read_exclusions(str(folder / "uncharacterized.txt")) == {2, 5}
    manifest = convert(folder, tmp_path / "out")
    assert without.counts.rows_out == len(SMALL)
    assert manifest.counts.quarantined_by_reason == {"excluded": 2}
    rejected = molecules(tmp_path / "out", manifest, "quarantine").to_pylist()
    assert [row["mol_id"] for row in rejected] == ["gdb_2", "gdb_5"]
    assert "uncharacterized.txt" in rejected[0]["detail"]
    assert manifest.sources[0].probe != without.sources[0].probe


@pytest.mark.parametrize("text", ["", "1 C\n2 C\n7 compounds\n7 C\n"])
def test_a_damaged_list_of_exclusions_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "uncharacterized.txt").write_text(text)
    with pytest.raises(DataError, match="no list of QM9's uncharacterized molecules"):
        read_exclusions(str(tmp_path / "uncharacterized.txt"))


def test_a_broken_file_among_those_of_qm9_goes_to_the_quarantine(tmp_path: Path) -> None:
    files = qm9_files()
    names = list(files)
    files[names[1]] = b"5\nbroken\n"
    files[names[3]] = files[names[3]].replace(b"NC=O", b"NCCO")
    source = tmp_path / "dsgdb9nsd.xyz.tar.bz2"
    source.write_bytes(tar_of(files, bz2.compress))
    manifest = convert(source, tmp_path / "out")
    assert manifest.counts.rows_in == len(SMALL)
    assert manifest.counts.quarantined_by_reason == {"geometry_mismatch": 1, "invalid_record": 1}


def test_other_xyz_files_are_refused(tmp_path: Path) -> None:
    content = {"a.xyz": b"1\ncomment\nC 0 0 0\n"}
    (tmp_path / "a.tar").write_bytes(tar_of(content, bytes))
    with pytest.raises(DataError, match=r"expected dsgdb9nsd\.xyz\.tar\.bz2 as published"):
        convert(tmp_path / "a.tar", tmp_path / "out")


def gdb9(samples: Sequence[SampleMolecule]) -> dict[str, bytes]:
    """The two files of DeepChem's archive."""
    names = ["mol_id", *QM9_PROPERTIES, "u0_atom", "u298_atom", "h298_atom", "g298_atom"]
    rows = [
        ",".join([f"gdb_{index + 1}", *(str(index + place) for place in range(len(names) - 1))])
        for index in range(len(samples))
    ]
    titles = [f"gdb_{index + 1}" for index in range(len(samples))]
    table = "\n".join([",".join(names), *rows]) + "\n"
    return {"gdb9.sdf": sdf(samples, titles), "gdb9.sdf.csv": table.encode()}


@pytest.mark.parametrize("layout", ["gdb9.tar.gz", "qm9.zip", "files"])
def test_the_qm9_of_deepchem_joins_its_table_with_its_geometry(
    tmp_path: Path, samples: list[SampleMolecule], layout: str
) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    files = gdb9(samples)
    if layout == "files":
        for name, content in files.items():
            (folder / name).write_bytes(content)
    elif layout == "qm9.zip":
        with zipfile.ZipFile(folder / layout, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        (folder / layout).write_bytes(tar_of(files, gzip.compress))
    (folder / "uncharacterized.txt").write_text(uncharacterized([3]))
    manifest = convert(folder, tmp_path / "out")
    counts = manifest.counts
    assert (counts.rows_in, counts.rows_out) == (NUM_MOLECULES, NUM_MOLECULES - 1)
    assert counts.with_coordinates == counts.rows_out
    assert counts.quarantined_by_reason == {"excluded": 1}
    units = {label.name: label.unit for label in manifest.labels}
    assert (units["gap"], units["u0_atom"], units["cv"]) == ("hartree", "kcal/mol", "cal/(mol K)")
    table = molecules(tmp_path / "out", manifest)
    assert table["mol_id"].to_pylist()[:3] == ["gdb_1", "gdb_2", "gdb_4"]
    assert table["label:A"].to_pylist()[:3] == [0.0, 1.0, 3.0]
    assert flat(table["smiles"].to_pylist()[2]) == flat(samples[3].smiles)


def test_titles_that_are_not_the_ids_of_their_rows_are_refused(
    tmp_path: Path, samples: list[SampleMolecule]
) -> None:
    files = gdb9(samples)
    files["gdb9.sdf"] = gdb9(samples[1:])["gdb9.sdf"].replace(b"gdb_", b"gdb_9")
    (tmp_path / "gdb9.tar.gz").write_bytes(tar_of(files, gzip.compress))
    with pytest.raises(DataError, match="the geometry is that of gdb_91, the row that of gdb_1"):
        convert(tmp_path / "gdb9.tar.gz", tmp_path / "out")


# --- MoleculeNet ------------------------------------------------------------------------------------

BACE = "mol,CID,Class,Model,pIC50,MW"
ESOL = (
    "Compound ID,ESOL predicted log solubility in mols per litre,Minimum Degree,Molecular Weight,"
    "Number of H-Bond Donors,Number of Rings,Number of Rotatable Bonds,Polar Surface Area,"
    "measured log solubility in mols per litre,smiles"
)
TOX21 = (
    "NR-AR,NR-AR-LBD,NR-AhR,NR-Aromatase,NR-ER,NR-ER-LBD,NR-PPAR-gamma,"
    "SR-ARE,SR-ATAD5,SR-HSE,SR-MMP,SR-p53,mol_id,smiles"
)


@pytest.mark.parametrize(
    ("name", "header", "row", "mol_id", "labels"),
    [
        ("BBBP.csv", "num,name,p_np,smiles", "7,Propanolol,1,CCO", "7", {"p_np": 1.0}),
        ("HIV.csv", "smiles,activity,HIV_active", "CCO,CI,0", None, {"HIV_active": 0.0}),
        ("bace.csv", BACE, "CCO,BACE_1,1,Train,9.1,46", "BACE_1", {"Class": 1.0, "pIC50": 9.1}),
        (
            "Lipophilicity.csv",
            "CMPD_CHEMBLID,exp,smiles",
            "CHEMBL5,3.5,CCO",
            "CHEMBL5",
            {"exp": 3.5},
        ),
        ("SAMPL.csv", "iupac,smiles,expt,calc", "ethanol,CCO,-5.0,-4.9", "ethanol", {"expt": -5.0}),
        (
            "delaney-processed.csv",
            ESOL,
            "Amigdalin,-0.97,1,457.4,7,3,7,202.3,-0.77,CCO",
            "Amigdalin",
            {"measured log solubility in mols per litre": -0.77},
        ),
        (
            "tox21.csv.gz",
            TOX21,
            "0,0,1,,,0,0,1,0,0,0,0,TOX3021,CCO",
            "TOX3021",
            {"NR-AR": 0.0, "NR-AhR": 1.0, "SR-p53": 0.0},
        ),
        (
            "clintox.csv.gz",
            "smiles,FDA_APPROVED,CT_TOX",
            "CCO,1,0",
            None,
            {"FDA_APPROVED": 1.0, "CT_TOX": 0.0},
        ),
        (
            "250k.csv",
            "smiles,logP,qed,SAS",
            '"CCO\n",5.05,0.7,2.0',
            None,
            {"logP": 5.05, "SAS": 2.0},
        ),
    ],
)
def test_moleculenet_tables_are_known_by_their_headers(
    tmp_path: Path, name: str, header: str, row: str, mol_id: str | None, labels: dict[str, float]
) -> None:
    from moleblend_ray.chemistry.records import SmilesText
    from moleblend_ray.data.sources import parse_chunk

    content = f"{header}\n{row}\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    source = inspect_sources(find_sources(str(tmp_path / name)), ColumnConfig())
    (layout,) = source.layouts
    (chunk,) = read_chunks(layout, 0, 10)
    (record,) = parse_chunk(chunk, layout)
    assert record.content == SmilesText("CCO")
    assert record.mol_id == mol_id
    found = dict(zip(layout.labels, record.labels.tolist(), strict=True))
    assert {key: found[key] for key in labels} == labels
    assert not {"num", "MW", "Minimum Degree", "calc", "mol_id"} & set(found)
