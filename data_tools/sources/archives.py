"""Zip and tar archives, webdataset shards among them: checked whole before the first byte is written."""

from __future__ import annotations

import glob
import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_tools.captioners.kohya import parse
from data_tools.errors import UNSAFE, DataToolsError, Problem, RefusedError, UsageError, grouped, shown
from data_tools.folder import METADATA, SIDECARS, inside
from data_tools.images import MAX_FILE_BYTES, SUFFIXES
from data_tools.sources.base import File, Order

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MAX_MEMBERS = 2_000_000
MAX_RATIO = 100
"""Unpacked bytes per packed byte of a whole archive; pictures hardly shrink, a bomb grows a thousandfold."""
SMALL = 16 * 2**20
"""Below this many bytes unpacked no ratio is dangerous."""
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
# Source: APPNOTE.TXT 6.3.10, general purpose bit 0.
ENCRYPTED = 0x1


DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, ValueError,
    RuntimeError, LookupError,
)  # fmt: skip
"""What the archive readers raise on damaged bytes."""


@dataclass(frozen=True)
class Member:
    """One file of an archive."""

    name: str
    size: int
    odd: str | None
    """What it is, when it is no plain file: a link, a device, encrypted."""


class Archives:
    """One archive or several shards; each of several gets a folder of its own."""

    summary = "a .zip or .tar(.gz|.bz2|.xz), webdataset shards, also as 'shards-{000..009}.tar'"

    def recognises(self, place: str) -> bool:
        """Files with an archive's ending, a pattern of them, or a folder that holds nothing else."""
        paths = expand(place)
        return bool(paths) and all(path.name.lower().endswith(ENDINGS) for path in paths)

    def read(self, order: Order) -> Iterator[File | Problem]:
        """Every picture, caption file, mask and metadata file; links, ways out and bombs refuse the archive."""
        paths = expand(order.place)
        for path in paths:
            prefix = f"{_stem(path)}/" if len(paths) > 1 else ""
            yield from _unpack(path, prefix)


def expand(place: str) -> list[Path]:
    """The archives that a path, a pattern (`*`, `{000..009}`) or a folder of shards means, in order."""
    path = Path(place).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        shards = [file for file in files if file.name.lower().endswith(ENDINGS)]
        rest = [file for file in files if file not in shards and file.suffix.lower() in SUFFIXES]
        return [] if rest else shards
    if path.is_file():
        return [path]
    counted = RANGE.search(place)
    if counted is not None:
        first, last = counted[1], counted[2]
        numbers = range(int(first), min(int(last), int(first) + MAX_MEMBERS) + 1)
        names = [f"{place[: counted.start()]}{number:0{len(first)}d}{place[counted.end() :]}" for number in numbers]
        missing = [name for name in names if not Path(name).expanduser().is_file()]
        if missing and len(missing) < len(names):
            raise UsageError(f"{shown(place)} means {len(names)} shards, and {len(missing)} are not there: "
                             f"{', '.join(shown(name) for name in missing[:5])}.")  # fmt: skip
        return [] if missing else [Path(name).expanduser() for name in names]
    return [Path(name) for name in sorted(glob.glob(str(path)))] if "*" in place else []


def _stem(path: Path) -> str:
    ending = max((ending for ending in ENDINGS if path.name.lower().endswith(ending)), key=len)
    return path.name[: -len(ending)] or path.name


def _unpack(path: Path, prefix: str) -> Iterator[File | Problem]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                yield from _read_zip(archive, path, prefix)
        else:
            yield from _read_tar(path, prefix)
    except DAMAGE as error:
        raise DataToolsError(
            f"{shown(str(path))} cannot be unpacked ({type(error).__name__}: {shown(str(error))}); it is damaged, half "
            "downloaded or of another kind: fetch it again. What was unpacked before stays."
        ) from error


def _read_zip(archive: zipfile.ZipFile, path: Path, prefix: str) -> Iterator[File | Problem]:
    # keep: not info.is_dir(), which fails on an empty name.
    infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
    plan = _Plan(path)
    for info in infos:
        plan.see(Member(info.filename, info.file_size, _zip_oddity(info)))
    yield from plan.settled(prefix)
    for info in infos:
        name = plan.target(info.filename)
        if name is not None:
            # keep: zipfile reads the stated size and compares the checksum, so a lying header gives no more bytes.
            yield File(prefix + name, archive.read(info))


def _zip_oddity(info: zipfile.ZipInfo) -> str | None:
    if info.flag_bits & ENCRYPTED:
        return "is encrypted"
    return "is a link" if stat.S_ISLNK(info.external_attr >> 16) else None


def _read_tar(path: Path, prefix: str) -> Iterator[File | Problem]:
    plan = _Plan(path)
    with tarfile.open(path) as archive:
        for info in archive:
            if not info.isdir():
                plan.see(Member(info.name, info.size, _tar_oddity(info)))
            # keep: here as well, because a packed stream of headers alone can be endless.
            plan.check_size(info.offset_data + info.size)
            _forget_headers(archive)
        _check_end(archive)
    yield from plan.settled(prefix)
    with tarfile.open(path) as archive:
        for info in archive:
            if info.isdir():
                continue
            name = plan.target(info.name)
            stream = archive.extractfile(info) if name is not None and info.isreg() else None
            if stream is not None:
                yield File(f"{prefix}{name}", stream.read(info.size))
            _forget_headers(archive)


def _forget_headers(archive: tarfile.TarFile) -> None:
    """tarfile keeps every header it has read; a million of them are gigabytes."""
    archive.members = []  # type: ignore[attr-defined]


def _check_end(archive: tarfile.TarFile) -> None:
    """An archive ends with a block of zeros; tarfile takes one that was cut off for one that is finished."""
    assert archive.fileobj is not None, "the archive is open"
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its end is missing")


def _tar_oddity(info: tarfile.TarInfo) -> str | None:
    if info.issym() or info.islnk():
        return "is a link"
    return None if info.isreg() else "is no plain file"


class _Plan:
    """What one archive holds: looked at member by member, refused before anything is written; then what goes where."""

    def __init__(self, path: Path) -> None:
        self.path, self.packed = path, path.stat().st_size
        self.members = self.unpacked = 0
        self.refused: list[Problem] = []
        self.aside: list[str] = []
        self.tops: set[str] = set()

    def see(self, member: Member) -> None:
        """Take a member into account.

        Raises:
            DataToolsError: there are too many by now, or too large ones; exit code 8.
        """
        self.members += 1
        self.unpacked += member.size
        self.check_size(self.unpacked)
        refusal = _refusal(member)
        if refusal is not None:
            self.refused.append(refusal)
        if _wanted(member.name):
            self.tops.add(_top(member.name))
        else:
            self.aside.append(member.name)

    def check_size(self, unpacked: int) -> None:
        """Stop at what would unpack to too much."""
        too_many = self.members > MAX_MEMBERS
        if too_many or unpacked > max(SMALL, MAX_RATIO * self.packed):
            sizes = f"{unpacked:,} bytes or more from {self.packed:,}"
            found = f"more than {MAX_MEMBERS:,} files" if too_many else sizes
            raise DataToolsError(
                f"{shown(str(self.path))} would unpack to {found}; this is a decompression bomb, or no archive of "
                "pictures. Nothing was written; unpack it by hand if you trust it.",
                exit_code=UNSAFE,
            )

    def settled(self, prefix: str) -> Iterator[Problem]:
        """A note on each member that is not unpacked, when all have been seen.

        Raises:
            DataToolsError: naming each member that makes the archive one not to be trusted; exit code 8.
        """
        if self.refused:
            raise DataToolsError(
                f"{shown(str(self.path))} is refused, and nothing was written:",
                grouped(self.refused),
                exit_code=UNSAFE,
            )
        for name in self.aside:
            yield Problem(
                f"{prefix}{name}",
                f"is left aside ({PurePosixPath(name).suffix.lower() or 'no file ending'})",
                "it is hidden, or its ending is none of a picture, caption or metadata",
                "unpack it by hand if it belongs to the dataset",
                "note",
            )

    def target(self, member: str) -> str | None:
        """The member's name in the new folder; None when it is left aside."""
        if not _wanted(member):
            return None
        name = inside(member)
        assert name is not None, "names were checked before"
        # keep: one folder around everything goes; a kohya folder stays, because its name counts.
        top = next(iter(self.tops)) if len(self.tops) == 1 else ""
        return name.removeprefix(f"{top}/") if top and parse(top) is None else name


def _refusal(member: Member) -> Problem | None:
    where = inside(member.name)
    if where is None:
        refusal = RefusedError(
            "leads out of the folder", "an archive may only fill its own folder", "do not trust this archive"
        )
    elif member.odd is not None:
        refusal = RefusedError(member.odd, "only plain files are unpacked", "pack it again with the file itself")
    elif member.size > MAX_FILE_BYTES and _wanted(member.name):
        refusal = RefusedError(
            f"holds {member.size:,} bytes", f"files above {MAX_FILE_BYTES:,} bytes are not read", "leave it out"
        )
    else:
        return None
    return refusal.problem(member.name)


def _wanted(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return not hidden and (path.suffix.lower() in (*SUFFIXES, *SIDECARS) or path.name in METADATA)


def _top(name: str) -> str:
    """The first folder of a name; empty where it lies in none."""
    first, slash, _ = str(PurePosixPath(name)).partition("/")
    return first if slash else ""
