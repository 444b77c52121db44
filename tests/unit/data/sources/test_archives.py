"""Archives and compressed files are streamed in bounded memory and never unpacked; malicious ones are rejected."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from moleblend_ray.chemistry.records import MolBlock, SmilesText
from moleblend_ray.chemistry.rejection import Rejection
from moleblend_ray.data.files import storage
from moleblend_ray.data.sources import (
    ColumnConfig,
    RawRecord,
    RowChunk,
    find_sources,
    inspect_sources,
    parse_chunk,
    read_chunks,
)
from moleblend_ray.data.sources.decompression import decompressed
from moleblend_ray.errors import ConfigError, DataError


def zstd(content: bytes) -> bytes:
    packed: bytes = pa.Codec("zstd").compress(content, asbytes=True)
    return packed


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": partial(lzma.compress, preset=0),
    ".zst": zstd,
}

METHANE = """{title}
     RDKit          3D

  1  0  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.0000 C   0  0  0  0  0  0  0  0  0  0  0  0
M  END
>  <mu>
{mu}

$$$$
"""

FILES = {
    "set/README.txt": b"smiles of no interest",
    "set/a.csv": b"smiles,y\nC,1\nCC,2\n",
    "set/deep/b.csv.gz": gzip.compress(b"smiles,y\r\nCCC,3\r\n"),
    "__MACOSX/set/._a.csv": b"\0\1",
    "set/.hidden.csv": b"no",
}


def tar(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def chunks_of(uri: Path | str, rows_per_chunk: int) -> Iterator[RowChunk]:
    (layout,) = inspect_sources(find_sources(str(uri)), ColumnConfig()).layouts
    yield from read_chunks(layout, 0, rows_per_chunk)


def test_mol_files_without_a_last_line_are_a_record_each(tmp_path: Path) -> None:
    block = METHANE.partition(">")[0]
    files = {f"{name}.mol": block.format(title=name).encode() for name in "abc"}
    (tmp_path / "all.tar").write_bytes(tar(files))
    (tmp_path / "d.mol").write_bytes(files["a.mol"].rstrip(b"\n"))
    for rows_per_chunk in (1, 2, 10):
        records = records_of(tmp_path, rows_per_chunk)
        assert [record.mol_id for record in records] == ["a", "b", "c", "a"]
        assert all(isinstance(record.content, MolBlock) for record in records)


def consume(chunks: Iterator[RowChunk]) -> int:
    return sum(chunk.num_rows for chunk in chunks)


def records_of(uri: Path | str, rows_per_chunk: int = 2) -> list[RawRecord]:
    found: list[RawRecord] = []
    files = find_sources(str(uri))
    for index, layout in enumerate(inspect_sources(files, ColumnConfig()).layouts):
        for chunk in read_chunks(layout, index, rows_per_chunk):
            found += parse_chunk(chunk, layout)
    return found


def smiles_and_labels(uri: Path | str) -> list[tuple[str | None, float]]:
    found = []
    for row, record in enumerate(records_of(uri)):
        assert record.row == row
        assert isinstance(record.content, SmilesText)
        found.append((record.content.smiles, record.labels[0]))
    return found


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("padding", [4, 512])
def test_zeros_behind_members_are_left_out_wherever_blocks_end(suffix: str, padding: int) -> None:
    packed = PACKERS[suffix](b"CCO\n" * 100)
    padded = 2 * (packed + bytes(padding))
    for size in (16, len(packed), len(packed) + 2, len(padded)):
        blocks = (padded[start : start + size] for start in range(0, len(padded), size))
        assert b"".join(decompressed(blocks)) == 2 * b"CCO\n" * 100


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_the_members_of_a_tar_are_one_table(tmp_path: Path, suffix: str, form: int) -> None:
    path = tmp_path / f"set.tar{suffix}"
    path.write_bytes(PACKERS[suffix](tar(FILES, form)))
    assert smiles_and_labels(path) == [("C", 1.0), ("CC", 2.0), ("CCC", 3.0)]


def test_the_members_of_a_zip_are_one_table(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(zipped(FILES))
    assert smiles_and_labels(tmp_path / "set.zip") == [("C", 1.0), ("CC", 2.0), ("CCC", 3.0)]
    assert smiles_and_labels(f"{tmp_path}/set.zip!*/b.csv.gz") == [("CCC", 3.0)]


@pytest.mark.parametrize("pack", [tar, zipped])
def test_a_member_without_a_line_end_does_not_run_into_the_next(
    tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]
) -> None:
    path = tmp_path / ("set.tar" if pack is tar else "set.zip")
    path.write_bytes(pack({"a.csv": b"smiles,y\nC,1\nCC,2", "b.csv": b"smiles,y\nCCC,3"}))
    assert smiles_and_labels(path) == [("C", 1.0), ("CC", 2.0), ("CCC", 3.0)]
    for number, tail in enumerate(("\n", "\n$$$$", "\n$$$$\n")):
        entries = {f"{i}.sdf": (METHANE.format(title=f"m{i}", mu=i)).encode() for i in range(3)}
        cut = {
            name: text.removesuffix(b"\n\n$$$$\n") + tail.encode() for name, text in entries.items()
        }
        sdf = tmp_path / f"sdf{number}{path.suffix}"
        sdf.write_bytes(pack(cut))
        records = records_of(sdf)
        assert [record.labels[0] for record in records] == [0.0, 1.0, 2.0]
        names = [
            str(record.content.block).splitlines()[0]
            for record in records
            if isinstance(record.content, MolBlock)
        ]
        assert names == ["m0", "m1", "m2"]


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("pack", [tar, zipped])
@pytest.mark.parametrize("end", [b"$$$$\n", b"$$$$", b"\n", b""])
def test_a_record_that_is_too_large_does_not_run_into_the_next_member(
    tmp_path: Path,
    pack: Callable[[dict[str, bytes]], bytes],
    end: bytes,
) -> None:
    first, large, last = (METHANE.format(title=f"m{i}", mu=i).encode() for i in range(3))
    large = large.removesuffix(b"$$$$\n") + b"> <image>\n" + b"x" * (2 << 20) + b"\n" + end
    path = tmp_path / ("set.tar" if pack is tar else "set.zip")
    path.write_bytes(pack({"a.sdf": first + large, "b.sdf.gz": gzip.compress(large + last)}))
    if end != b"$$$$\n":
        path.write_bytes(pack({"a.sdf": first + large, "b.sdf.gz": gzip.compress(last)}))
    records = records_of(path)
    too_large = [isinstance(record.content, Rejection) for record in records]
    assert too_large == ([False, True, True, False] if end == b"$$$$\n" else [False, True, False])
    assert [record.mol_id for record in records if isinstance(record.content, MolBlock)] == [
        "m0",
        "m2",
    ]


@pytest.mark.parametrize("pack", [tar, zipped])
def test_tables_with_semicolons_may_be_in_archives(
    tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]
) -> None:
    path = tmp_path / ("set.tar" if pack is tar else "set.zip")
    path.write_bytes(pack({"a.csv": b"smiles;y\nC;1\n", "b.csv": b"sep=;\r\nsmiles;y\nCC;2\n"}))
    assert smiles_and_labels(path) == [("C", 1.0), ("CC", 2.0)]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_from_extended_headers(tmp_path: Path, form: int) -> None:
    name = "/".join(["folder" * 10] * 5) + "/a.smi"
    (tmp_path / "x.tgz").write_bytes(gzip.compress(tar({name: b"C one\n"}, form)))
    assert [record.mol_id for record in records_of(tmp_path / "x.tgz")] == ["one"]
    assert [record.mol_id for record in records_of(f"{tmp_path}/x.tgz!*/folder*/a.smi")] == ["one"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_plain_files_may_be_compressed_in_four_ways(tmp_path: Path, suffix: str) -> None:
    rows = "".join(f"C,{row}\n" for row in range(5000))
    (tmp_path / f"t.csv{suffix}").write_bytes(PACKERS[suffix](b"smiles,y\n" + rows.encode()))
    block = "".join(METHANE.format(title=f"m{i}", mu=i) for i in range(300))
    (tmp_path / f"u.sdf{suffix}").write_bytes(PACKERS[suffix](block.encode()))
    records = records_of(tmp_path, rows_per_chunk=1000)
    assert [record.labels[0] for record in records[:5000]] == list(range(5000))
    assert [record.labels[1] for record in records[5000:]] == list(range(300))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["t.csv", "t.tar"])
def test_a_cut_off_file_gives_its_complete_chunks_then_names_the_record(
    tmp_path: Path, suffix: str, name: str
) -> None:
    import random

    generator = random.Random(0)
    rows = [f"C,{generator.random()}\n".encode() for _ in range(60_000)]
    table = b"smiles,y\n" + b"".join(rows)
    whole = PACKERS[suffix](tar({"t.csv": table}) if name == "t.tar" else table)
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(whole[: len(whole) * 3 // 4])
    (layout,) = inspect_sources(find_sources(str(path)), ColumnConfig()).layouts
    found: list[RowChunk] = []

    def collect() -> None:
        for chunk in read_chunks(layout, 0, 1000):
            found.append(chunk)  # noqa: PERF402 - what comes before the error counts

    with pytest.raises(
        DataError, match=r"is damaged after record \d+.*(truncated|corrupt)"
    ) as error:
        collect()
    record = int(str(error.value).split("after record ")[1].split(" ")[0])
    assert len(found) > 0
    assert 1000 * len(found) <= record < 1000 * len(found) + 1000
    assert b"".join(chunk.payload for chunk in found) == b"".join(rows[: 1000 * len(found)])


def test_a_tar_without_its_end_is_truncated(tmp_path: Path) -> None:
    content = tar({"a.smi": b"C\n"})
    (tmp_path / "a.tar").write_bytes(content[: 2 * tarfile.BLOCKSIZE])
    with pytest.raises(DataError, match=r"damaged after record 1.*the tar archive is truncated"):
        records_of(tmp_path / "a.tar", rows_per_chunk=1)


def test_a_corrupt_member_of_a_zip_is_told(tmp_path: Path) -> None:
    content = bytearray(
        zipped({"a.csv": b"smiles,y\n" + b"".join(b"C,%d\n" % i for i in range(9000))})
    )
    content[3000] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.zip is damaged after record \d+.*a\.csv of the zip"):
        records_of(tmp_path / "a.zip")
    (tmp_path / "b.zip").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match=r"b\.zip is no zip archive"):
        records_of(tmp_path / "b.zip")


def test_a_byte_order_mark_and_line_ends_make_no_other_header(tmp_path: Path) -> None:
    members = {"a.csv": b"\xef\xbb\xbfsmiles,y\r\nC,1\r\n", "b.csv": b"smiles,y\nCC,2\n"}
    (tmp_path / "a.zip").write_bytes(zipped(members))
    assert [record.labels.tolist() for record in records_of(tmp_path / "a.zip")] == [[1], [2]]


def test_files_with_other_headers_are_not_put_together(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        tar({"a.csv": b"smiles,y\nC,1\n", "b.csv": b"y,smiles\n2,C\n"})
    )
    with pytest.raises(
        DataError, match=r"damaged after record 1.*header of b\.csv .*: 'y,smiles'.*'smiles,y'"
    ):
        records_of(tmp_path / "a.tar")


def test_molecules_in_two_formats_must_be_chosen_from(tmp_path: Path) -> None:
    sdf = METHANE.format(title="m", mu=1).encode()
    (tmp_path / "a.tar").write_bytes(tar({"a.csv": b"smiles,y\nC,1\n", "b.sdf": sdf}))
    with pytest.raises(DataError, match=r"csv files and with b\.sdf sdf files.*ARCHIVE!PATTERN"):
        records_of(tmp_path / "a.tar")
    assert [record.mol_id for record in records_of(f"{tmp_path}/a.tar!*.sdf")] == ["m"]


def test_molecules_may_come_late_in_a_tar_archive(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"paper.pdf": bytes(65 << 20), "m.smi": b"C\nCC\n"}))
    (tmp_path / "b.smi").write_text("CCC\n")
    assert len(records_of(tmp_path)) == 3


def test_an_archive_without_molecules_is_left_out_or_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"notes.md": b"x"}))
    (tmp_path / "b.smi").write_text("C\n")
    assert len(records_of(tmp_path)) == 1
    assert "1 files of other kinds are left out: a.tar" in caplog.text
    with pytest.raises(DataError, match=r"found a\.tar; expected"):
        records_of(tmp_path / "a.tar")
    with pytest.raises(ConfigError, match="expected a pattern"):
        records_of(f"{tmp_path}/a.tar!")


# --- made to harm -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../a.csv", "/etc/a.csv", "x/../../a.csv", "C:\\a.csv", "..\\a.csv"]
)
@pytest.mark.parametrize("pack", [tar, zipped])
def test_names_that_lead_out_of_the_archive_are_refused(
    tmp_path: Path, name: str, pack: Callable[[dict[str, bytes]], bytes]
) -> None:
    path = tmp_path / ("a.tar" if pack is tar else "a.zip")
    path.write_bytes(pack({name: b"smiles,y\nC,1\n"}))
    with pytest.raises(DataError, match="is refused: its name leads out of the archive"):
        records_of(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("a.csv")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match=r"'a\.csv' is refused: it is a link, a device or a sparse"):
        records_of(tmp_path / "a.tar")


def test_links_and_encrypted_members_of_a_zip_are_refused(tmp_path: Path) -> None:
    for name, mode, flags, reason in (
        ("a", 0o120777, 0, "a link or a device"),
        ("b", 0o100644, 1, "it is encrypted"),
    ):
        info = zipfile.ZipInfo("a.csv")
        info.external_attr = mode << 16
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(info, "smiles,y\nC,1\n")
            archive.filelist[0].flag_bits |= flags
        with pytest.raises(DataError, match=f"is refused: .*{reason}"):
            records_of(tmp_path / f"{name}.zip")


@pytest.mark.parametrize("suffix", [".csv.gz", ".csv.bz2", ".csv.xz", ".zip", ".tar.gz"])
def test_a_bomb_is_stopped_with_little_memory(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moleblend_ray.data.sources import archives, decompression

    for module in (decompression, archives):
        monkeypatch.setattr(module, "_EXPANSION_GRACE_BYTES", 1 << 20)
    content = b"smiles,y\n" + (b"C" * (1 << 16) + b",1\n") * 640
    if suffix == ".zip":
        packed = zipped({"a.csv": content})
    elif suffix == ".tar.gz":
        packed = gzip.compress(tar({"a.csv": content}))
    else:
        packed = PACKERS[suffix.removeprefix(".csv")](content)
    (tmp_path / f"a{suffix}").write_bytes(packed)
    del content
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"expands to more than 200 times"):
            consume(chunks_of(tmp_path / f"a{suffix}", rows_per_chunk=10))
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_an_extended_header_of_any_size_is_not_read_into_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 40
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(DataError, match=r"a tar header of 1099511627776 bytes"):
        records_of(tmp_path / "a.tar")


# --- memory and object storage ------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["smi.gz", "tar.gz"])
def test_reading_takes_the_memory_of_a_chunk_whatever_the_size_of_the_file(
    tmp_path: Path, container: str
) -> None:
    def peak(num_rows: int) -> int:
        lines = b"".join(b"C1CCCCC1C(=O)N %0200d\n" % (row * row) for row in range(num_rows))
        path = tmp_path / f"{num_rows}.{container}"
        packed = lines if container == "smi.gz" else tar({"a.smi": lines})
        path.write_bytes(gzip.compress(packed, 1))
        del lines, packed
        (layout,) = inspect_sources(find_sources(str(path)), ColumnConfig()).layouts
        tracemalloc.start()
        try:
            assert consume(read_chunks(layout, 0, 8192)) == num_rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(30_000), peak(120_000)
    # 27 MB of text against 7 MB; only the window of compressed bytes grows a little.
    assert large < 1.25 * small
    assert large < 14 << 20


def test_archives_in_s3_are_read_in_place(s3_uri: str) -> None:
    storage.write_bytes(s3_uri + "/a.tar.gz", gzip.compress(tar(FILES)))
    storage.write_bytes(s3_uri + "/b.zip", zipped(FILES))
    labels = [label for _, label in smiles_and_labels(s3_uri + "/a.tar.gz")]
    assert labels == [label for _, label in smiles_and_labels(s3_uri + "/b.zip")] == [1, 2, 3]
