"""Members of tar and zip archives as streams. Nothing is unpacked to disk, so names of members cannot do harm.

An archive is rejected if a member that holds molecules is a link or a device, is encrypted, expands out of proportion
or has a name that leads out of the archive: silently skipping such a member would be noticed too late.
"""

from __future__ import annotations

import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import BinaryIO, Final, NamedTuple

from moleblend_ray.data.sources.damage import DamageError
from moleblend_ray.data.sources.decompression import COMPRESSIONS, blocks_of, decompressed
from moleblend_ray.data.sources.records import Container, Format, SourceFile
from moleblend_ray.errors import DataError

CONTAINERS: Final[dict[str, Container]] = {
    ".tar": "tar",
    ".tgz": "tar",
    ".tbz2": "tar",
    ".txz": "tar",
    ".zip": "zip",
}
"""Suffix -> kind of archive; ``.tar`` may be followed by the suffix of a compression."""

_FORMATS: Final[dict[str, Format]] = {
    ".sdf": "sdf",
    ".sd": "sdf",
    ".mol": "sdf",
    ".csv": "csv",
    ".tsv": "tsv",
    ".smi": "smi",
    ".smiles": "smi",
    ".cxsmiles": "smi",
    ".ism": "smi",
    ".xyz": "xyz",
}

_BLOCK: Final = tarfile.BLOCKSIZE
_MAX_HEADER_BYTES: Final = 1 << 20
"""Limit for an extended header, which contains a path."""
_MAX_EXPANSION: Final = 200
_EXPANSION_GRACE_BYTES: Final = 256 << 20


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    """As stored in the archive."""
    blocks: Iterator[bytes]
    """Its content, which can be read until the next member is asked for."""


def container_of(name: str) -> Container | None:
    """Kind of archive of a file with this name; None if it is not an archive."""
    lowered = name.lower()
    for suffix in COMPRESSIONS:
        if lowered.endswith(".tar" + suffix):
            return "tar"
    return next((kind for suffix, kind in CONTAINERS.items() if lowered.endswith(suffix)), None)


def text_format(name: str) -> Format | None:
    """Format of a text file, compressed or not, with this name; None if it is unknown."""
    lowered = name.lower()
    for suffix in COMPRESSIONS:
        lowered = lowered.removesuffix(suffix)
    return next((form for end, form in _FORMATS.items() if lowered.endswith(end)), None)


def contents(file: SourceFile, stream: BinaryIO) -> Iterator[Member]:
    """The decompressed texts of a file: one for a plain file, one per member with molecules for an archive.

    DataError if an archive holds molecules in two formats, or a member because of which it is rejected.
    """
    if file.container is None:
        size = file.size - (file.geometry.size if file.geometry else 0)
        yield Member("", decompressed(_whole(blocks_of(stream), size)))
        return
    for name, form, blocks in _molecule_members(file.uri, file.container, file.members, stream):
        expected = "csv" if file.format == "semicolon" else file.format
        if form != expected:
            raise DataError(
                f"{file.uri} holds {expected} files and with {name} {form} files; expected one kind. "
                f"Choose some by ARCHIVE!PATTERN, such as {file.uri}!*.{expected}."
            )
        yield Member(name, decompressed(blocks))


def _whole(blocks: Iterator[bytes], num_bytes: int) -> Iterator[bytes]:
    """The blocks; DamageError if they have fewer bytes. Where the end of a connection is that of the file, as for web
    servers that do not say how long it is, nothing else tells that it was cut off."""
    given = 0
    for block in blocks:
        given += len(block)
        yield block
    if given < num_bytes:
        raise DamageError(
            f"it ended after {given:,} of {num_bytes:,} bytes, which it had when it was looked at; the connection was lost, or "
            "the file has changed"
        )


def first_format(uri: str, container: Container, pattern: str, stream: BinaryIO) -> Format | None:
    """Format of the first member with molecules; None if there is none, for which a tar archive is read to its end."""
    members = _molecule_members(uri, container, pattern, stream)
    return next((form for _, form, _ in members), None)


def zip_names(uri: str, stream: BinaryIO) -> list[str]:
    """Names of the members of a zip archive."""
    with _zip_archive(uri, stream) as archive:
        return archive.namelist()


def _molecule_members(
    uri: str, container: Container, pattern: str, stream: BinaryIO
) -> Iterator[tuple[str, Format, Iterator[bytes]]]:
    def wanted(name: str) -> bool:
        is_hidden = any(part.startswith((".", "__MACOSX")) for part in _parts(name))
        return text_format(name) is not None and not is_hidden and fnmatchcase(name, pattern)

    if container == "tar":
        members = _tar_members(uri, decompressed(blocks_of(stream)), wanted)
    else:
        members = _zip_members(uri, stream, wanted)
    for name, blocks in members:
        form = text_format(name)
        assert form is not None
        yield name, form, blocks


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]


def _check_name(uri: str, name: str) -> None:
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or name[1:2] == ":":
        raise _refused(uri, name, "its name leads out of the archive")


def _refused(uri: str, name: str, reason: str) -> DataError:
    return DataError(
        f"{uri}: member {name!r} is refused: {reason}. Pack the archive anew, or choose other members "
        "by ARCHIVE!PATTERN."
    )


# -- tar ----------------------------------------------------------------------------------------------


class _Bytes:
    """An iterator of blocks, read by number of bytes."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = b""

    def pieces(self, count: int) -> Iterator[bytes]:
        """The next ``count`` bytes in pieces; DamageError if the stream ends before."""
        while count:
            piece = self._rest or next(self._blocks, b"")
            if not piece:
                raise DamageError("the tar archive is truncated")
            piece, self._rest = piece[:count], piece[count:]
            count -= len(piece)
            yield piece

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        return b"".join(self.pieces(count))

    def skip(self, count: int) -> None:
        """Skip ``count`` bytes."""
        for _ in self.pieces(count):
            pass

    def drain(self) -> None:
        """Read to the end, so that a decompressor checks its checksum."""
        for _ in self._blocks:
            pass


def _tar_members(
    uri: str, blocks: Iterator[bytes], wanted: Callable[[str], bool]
) -> Iterator[Member]:
    """Members in order, with one header in memory at a time.

    Of ``tarfile`` only the parser of single headers is used: it would read extended headers of any size, and keep all
    headers in memory.
    """
    stream = _Bytes(blocks)
    extended: dict[str, str] = {}
    while True:
        try:
            # A name that is not UTF-8 must not end the reading.
            header = tarfile.TarInfo.frombuf(stream.read(_BLOCK), "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            stream.drain()
            return
        except tarfile.HeaderError as error:
            raise DamageError(f"the tar archive is corrupt ({error})") from error
        padded = -(-header.size // _BLOCK) * _BLOCK
        if header.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            if header.size > _MAX_HEADER_BYTES:
                raise DamageError(f"a tar header of {header.size} bytes")
            extended |= _extension(header, stream.read(padded)[: header.size])
            continue
        name = extended.get("path", header.name)
        size = _pax_size(extended, header.size)
        extended = {}
        content = stream.pieces(size)
        if wanted(name) and header.type != tarfile.DIRTYPE:
            _check_name(uri, name)
            if not header.isreg() or header.type == tarfile.GNUTYPE_SPARSE:
                raise _refused(uri, name, "it is a link, a device or a sparse file")
            yield Member(name, content)
        for _ in content:  # what the caller has not read
            pass
        stream.skip(-size % _BLOCK)


def _extension(header: tarfile.TarInfo, body: bytes) -> dict[str, str]:
    """Path and size of the next member, as far as an extended header states them."""
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": body.rstrip(b"\0").decode("utf-8", "surrogateescape")}
    if header.type == tarfile.GNUTYPE_LONGLINK:
        return {}
    found = {}
    for match in re.finditer(rb"\d+ (path|size)=([^\n]*)\n", body):
        found[match[1].decode()] = match[2].decode("utf-8", "surrogateescape")
    return found


def _pax_size(extended: dict[str, str], size: int) -> int:
    text = extended.get("size", str(size))
    if not text.isdecimal():
        raise DamageError(f"a tar header with size {text!r}")
    return int(text)


# -- zip ----------------------------------------------------------------------------------------------


def _zip_archive(uri: str, stream: BinaryIO) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(stream)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise DataError(
            f"{uri} is no zip archive or is damaged: {error}. Fetch it again."
        ) from error


def _zip_members(uri: str, stream: BinaryIO, wanted: Callable[[str], bool]) -> Iterator[Member]:
    packed_bytes = stream.seek(0, io.SEEK_END)
    with _zip_archive(uri, stream) as archive:
        unpacked_bytes = 0
        for info in archive.infolist():
            if not info.is_dir() and wanted(info.filename):
                _check_name(uri, info.filename)
                _check_zip_member(uri, info)
                # Members can overlap in the archive, so that each is in proportion but their sum is not.
                unpacked_bytes += info.file_size
                if unpacked_bytes > max(_EXPANSION_GRACE_BYTES, _MAX_EXPANSION * packed_bytes):
                    reason = f"all together expand to more than {_MAX_EXPANSION} times the archive"
                    raise _refused(uri, info.filename, f"it and those before it {reason}")
                yield Member(info.filename, _zip_blocks(archive, info))


def _check_zip_member(uri: str, info: zipfile.ZipInfo) -> None:
    kind = info.external_attr >> 28  # the type in the mode of a Unix file
    if kind not in (0, 8):
        raise _refused(uri, info.filename, "it is a link or a device")
    if info.flag_bits & 1:
        raise _refused(uri, info.filename, "it is encrypted")
    is_large = info.file_size > _EXPANSION_GRACE_BYTES
    if is_large and info.file_size > _MAX_EXPANSION * max(1, info.compress_size):
        raise _refused(
            uri, info.filename, f"it expands to more than {_MAX_EXPANSION} times its size"
        )


def _zip_blocks(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
    try:
        with archive.open(info) as content:
            yield from blocks_of(content)  # type: ignore[arg-type]
    # zlib.error is not an OSError; EOFError: the archive is cut off.
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DamageError(
            f"member {info.filename} of the zip archive is corrupt ({error})"
        ) from error
