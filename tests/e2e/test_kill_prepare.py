"""Kill `moleblend prepare` in each of its phases, type it again, in the end twice at once: the files are those of an
undisturbed run."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import LIMIT_S, kill_when, moleblend
from in_process import prepare_in_process

from moleblend_ray.data.preparation.options import ConvertOptions
from moleblend_ray.data.sources import ColumnConfig

# As if there were memory for some hundred molecules only: the source is then of many groups.
SMALL_GROUPS = """
from moleblend_ray.data.preparation import exchange

exchange._MAX_GROUP_BYTES = 60_000
"""


OPTIONS = ConvertOptions(
    columns=ColumnConfig(),
    rows_per_chunk=100,
    rows_per_shard=150,
    shuffle=True,
    deduplicate="inchikey",
    test_fraction=0.1,
)


def start(source: Path, out: Path) -> subprocess.Popen[str]:
    settings = [
        f"source={source}", f"out={out}", "rows_per_chunk=100", "rows_per_shard=150",
        "shuffle=true", "deduplicate=inchikey", "test_fraction=0.1", "cluster.num_data_actors=2",
    ]  # fmt: skip
    return moleblend("prepare", *settings, before=SMALL_GROUPS)


def content_of(out: Path) -> dict[str, bytes]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def finish_one(commands: Sequence[subprocess.Popen[str]], out: Path) -> None:
    """Wait for commands of which one at least must end well; the others may find that it works there."""
    endings = [
        (command.communicate(timeout=LIMIT_S)[1], command.returncode) for command in commands
    ]
    refused = [errors for errors, code in endings if code]
    assert len(refused) < len(commands), refused
    for errors in refused:
        assert f"another command works on {out} at this moment" in errors


@pytest.mark.ray
@pytest.mark.slow
def test_a_prepare_killed_in_every_phase_and_typed_twice_ends_as_the_undisturbed_one(
    tmp_path: Path,
) -> None:
    chains = [f"{'C' * a}{middle}{'C' * b}{end}" for a in range(1, 13) for b in range(1, 13)
              for middle in ("O", "N", "S", "C(=O)N", "C#C", "OO") for end in ("", "F", "Cl")]  # fmt: skip
    source, out = tmp_path / "in.csv", tmp_path / "killed"
    source.write_text("\n".join(["smiles", *chains, "C1CC", *chains[:100]]) + "\n")
    prepare_in_process(str(source), str(tmp_path / "undisturbed"), OPTIONS)
    expected = content_of(tmp_path / "undisturbed")
    names = {name.split("/")[0] for name in expected}
    assert names == {"train", "valid", "test", "quarantine", "manifest.json"}

    def count(pattern: str) -> int:
        return len(list(out.glob(pattern)))

    num_buckets = sum(name.startswith("train/") for name in expected)
    moments = {
        "chunks": lambda: count("receipts/0*.json") >= 5,
        "runs": lambda: count("receipts/runs/*.json") >= 3,
        "manifest": lambda: count("receipts/buckets/*.json") == num_buckets,
    }
    for moment, seen in moments.items():
        kill_when(seen, start(source, out), whole_group=True)
        assert not (out / "manifest.json").exists(), f"the kill among the {moment} came too late"
    finish_one([start(source, out), start(source, out)], out)
    assert content_of(out) == expected
