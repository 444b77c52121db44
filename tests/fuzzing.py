"""Damaged and hostile records, the same for the same seed: SMILES, SD records and bytes of no meaning at all."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from moleblend_ray.data.dataset.manifest import load_manifest

SEEDS = (
    "CCO",
    "C[C@H](N)C(=O)[O-]",
    "c1ccc2[nH]ccc2c1",
    "F/C=C/F",
    "CC(=O)O.[Na+]",
    "C1CC2CC1CC2",
    "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",
    "[13CH3][N+](C)(C)CC#N",
    "O=S(=O)(c1ccccc1)N1CCOCC1",
    "N->[Zn](<-N)Cl",
    "C/C=C\\C=N\\O",
    "OC[C@H]1O[C@@H](O)[C@H](O)[C@@H](O)[C@@H]1O",
    "FC(F)(F)c1cc(Br)c(I)cc1[Si](C)(C)C",
    "C12C3C4C1C5C2C3C45",
    "[2H]C([2H])([2H])[P@](=O)(O)CC",
)
SYMBOLS = (
    *"BCNOPSFIbcnops*.=#$:-/\\()[]@+~><|{}%0123456789HRX \t\"',;",
    *("Cl", "Br", "[H]", "[C@@H]", "%(100)", "%99", "[U+6]", "[Fe+300]", "[CH255]", "[999C]", "->"),
    *("[*:1]", "[#119]", "[CH9]", "[Og]", "[nH]", "é", "\u2028", "😀", "\ufeff", "\x7f"),
)
HOSTILE_SMILES = (
    "",
    " ",
    "\0",
    "C\0C",
    "C" * 1_000_000,
    "C1" * 500_000,
    "C1CC1" * 3000,
    "C(" * 5000 + "C" + ")" * 5000,
    "(" * 5000,
    "[" * 5000,
    ".".join("C" * 3000),
    "C%(" + "9" * 5000 + ")C",
    "C" + "1" * 5000,
    "[" + "9" * 5000 + "C]",
    "[C" + "+" * 5000 + "]",
    "[H]" * 3000,
    "C |" + "(0,0,0;" * 2000 + "|",
    "CC |(nan,nan,nan;inf,0,0)|",
    "C\ud800C",
    "*" * 256,
    "[U]" + "([H])" * 254,
    "CC(C)C |wD:1.0,&1:1|",
    "C=CC=C |c:0,t:2|",
)
HOSTILE_VALUES = (
    *(
        "nan",
        "inf",
        "-inf",
        "1e308",
        "-1",
        "-999",
        "999",
        "99999999999",
        "0",
        "",
        "\0",
        "é",
        "*",
        "R#",
        "Q",
    ),
    *("V3000", "V2000", "M  END", "M  CHG  8", "M  ISO  1 999 999", "M  RGP", "A", "L", "0.0000"),
)


def smiles_inputs(count: int, seed: int) -> Iterator[str]:
    """``count`` texts: the hostile ones first, then mutations and random symbols."""
    rng = random.Random(seed)
    yield from HOSTILE_SMILES[:count]
    for _ in range(count - len(HOSTILE_SMILES)):
        if rng.random() < 0.1:
            yield "".join(rng.choices(SYMBOLS, k=rng.randint(1, 30)))
        else:
            yield _mutated_text(rng, rng.choice(SEEDS))


def _mutated_text(rng: random.Random, text: str) -> str:
    symbols = list(text)
    for _ in range(rng.randint(1, 3)):
        place = rng.randint(0, len(symbols))
        match rng.randrange(5):
            case 0:
                symbols[place:place] = [rng.choice(SYMBOLS)]
            case 1:
                symbols[place : place + 1] = [rng.choice(SYMBOLS)]
            case 2:
                del symbols[place : place + rng.randint(1, 3)]
            case 3:
                symbols[place:place] = symbols[: rng.randint(1, len(symbols) or 1)]
            case _:
                symbols += rng.choice(SEEDS)
    return "".join(symbols)


def molblock_inputs(count: int, seed: int) -> Iterator[str]:
    """``count`` SD records without the ``$$$$`` line: mutations of V2000 and V3000 records, and noise."""
    rng = random.Random(seed)
    seeds = _seed_blocks()
    mutations: tuple[Callable[[random.Random, str], str], ...] = (
        _damaged_line,
        _damaged_line,
        _without_lines,
        _damaged_characters,
        lambda rng, _: random_text(rng),
    )
    for _ in range(count):
        block = rng.choice(mutations)(rng, rng.choice(seeds))
        yield block.replace("\n", "\r\n") if rng.random() < 0.1 else block


def _seed_blocks() -> list[str]:
    """Records with geometry where RDKit makes one, else flat, in both versions of the format."""
    blocks = []
    for index, smiles in enumerate(SEEDS):
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        rdDistGeom.EmbedMolecule(mol, randomSeed=7, maxAttempts=5)
        blocks += [Chem.MolToMolBlock(mol, forceV3000=index % 3 == 0, kekulize=index % 2 == 0)]
    return blocks


def _damaged_line(rng: random.Random, block: str) -> str:
    """One field of one line replaced, in its place or not."""
    lines = block.split("\n")
    row = rng.randrange(len(lines))
    fields = lines[row].split(" ")
    fields[rng.randrange(len(fields))] = rng.choice(HOSTILE_VALUES)
    lines[row] = " ".join(fields)
    if rng.random() < 0.3:  # the stereo mark "cis or trans"
        lines = [f"{line[:9]}  3{line[12:]}" if len(line) == 12 else line for line in lines]
    return "\n".join(lines)


def _without_lines(rng: random.Random, block: str) -> str:
    lines = block.split("\n")
    first = rng.randrange(len(lines))
    moved = lines[first : first + rng.randint(1, 4)]
    del lines[first : first + len(moved)]
    if rng.random() < 0.5:
        place = rng.randint(0, len(lines))
        lines[place:place] = moved * rng.randint(1, 3)
    return "\n".join(lines)


def _damaged_characters(rng: random.Random, block: str) -> str:
    characters = list(block)
    for _ in range(rng.randint(1, 6)):
        characters[rng.randrange(len(characters))] = rng.choice("09-. \n\0~éCN\t")
    return "".join(characters)


def random_text(rng: random.Random) -> str:
    """Bytes of no meaning, as text of one character a byte."""
    return rng.randbytes(rng.randint(0, 200)).decode("latin-1")


def csv_file(records: Iterator[str]) -> tuple[bytes, int]:
    """A table with one quoted record a row, and its rows. Lone surrogates become bytes that are no UTF-8."""
    rows = [
        '"' + record.replace('"', '""').replace("\r", " ").replace("\n", " ") + '"\n'
        for record in records
    ]
    return "".join(["smiles\n", *rows]).encode("utf-8", "surrogatepass"), len(rows)


def sdf_file(records: Iterator[str]) -> tuple[bytes, int]:
    """An SD file of the records, and their number."""
    parts = [record.replace("$$$$", "$$$ ") + "\n$$$$\n" for record in records]
    return "".join(parts).encode("utf-8", "surrogatepass"), len(parts)


def write_sources(folder: Path, count: int, seed: int) -> list[int]:
    """About ``count`` records in a CSV, a TSV and two SD files; rows of each file in the order of their names."""
    tenth = max(1, count // 10)
    rng = random.Random(seed)
    files = {
        "a.csv": csv_file(smiles_inputs(5 * tenth, seed)),
        "b.tsv": csv_file(random_text(rng) for _ in range(tenth)),
        "c.sdf": sdf_file(molblock_inputs(3 * tenth, seed)),
        "d.sdf": sdf_file(random_text(rng) for _ in range(count - 9 * tenth)),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    return [rows for _, rows in files.values()]


def accounting_errors(out: Path, rows: Sequence[int]) -> list[str]:
    """What is wrong where each row of each source file should be in the shards or the quarantine, once."""
    manifest = load_manifest(str(out))
    seen = [Counter[int]() for _ in rows]
    for shard in manifest.shards:
        table = pq.read_table(out / shard.path, columns=["source_row"])
        seen[int(Path(shard.path).name.split("-")[0])].update(table["source_row"].to_pylist())
    errors = [
        f"file {index}: {count} rows, found {len(found)} different and {found.total()} in all"
        for index, (count, found) in enumerate(zip(rows, seen, strict=True))
        if found != Counter(range(count))
    ]
    counts = manifest.counts
    if counts.rows_in != sum(rows) or counts.rows_in != counts.rows_out + counts.rows_quarantined:
        errors.append(f"counts of the manifest: {counts}")
    return errors
