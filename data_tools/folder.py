"""What lies in a dataset folder: pictures, caption files, metadata; all else is named with a reason."""

from __future__ import annotations

import heapq
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath

from data_tools.errors import STORAGE, UNSAFE, Problem, UsageError, shown
from data_tools.files import kind_of, not_regular
from data_tools.images import SUFFIXES
from data_tools.masks import find_masks
from data_tools.names import stem, suffix
from data_tools.shelves import Index, Lookup, Shelf

SIDECARS = (".txt", ".caption", ".json")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SORTED_AT_ONCE = 20_000
OWN = ".finetune"
"""What an import remembers lies here, in the folder it fills."""
# Source: "Naming Files, Paths, and Namespaces", Windows documentation.
WINDOWS = re.compile(r'[<>:"|?*\\]|[. ](?:/|$)|(?:^|/)(?:con|prn|aux|nul|com\d|lpt\d)(?:\.|/|$)', re.IGNORECASE)
# Source: datasets 5.2, data_files.py, SPLIT_KEYWORDS between NON_WORDS_CHARS.
SPLIT_WORD = re.compile(
    r"(?:^|[-._ 0-9/])(train|training|validation|valid|dev|val|test|testing|eval|evaluation)(?:[-._ 0-9/]|$)"
)


@dataclass
class Listing:
    """The files of one folder, as paths relative to `root` with forward slashes, in `order`."""

    root: Path
    pictures: Sequence[str] = field(default_factory=Shelf)
    sidecars: Sequence[str] = field(default_factory=Shelf)
    metadata: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    masks: dict[str, str] = field(default_factory=dict)
    """Picture -> mask, found by name; masks are not among `pictures`."""

    @cached_property
    def by_stem(self) -> Lookup[str]:
        """Pictures by their names without ending."""
        return Lookup(self.pictures, stem)


def order(names: Iterable[str]) -> list[str]:
    """Names by code points of their composed (NFC) form, equal on all systems; img10 comes before img2."""
    return sorted(names, key=_rank)


def _rank(name: str) -> tuple[str, str]:
    return (name if name.isascii() else unicodedata.normalize("NFC", name), name)


def _in_order(names: Iterable[str]) -> Iterator[str]:
    """As `order`, for more names than memory should hold: sorted in runs, which are then merged."""
    left = iter(names)
    runs = []
    while run := list(islice(left, SORTED_AT_ONCE)):
        runs.append(Shelf(order(run)))
    return heapq.merge(*runs, key=_rank) if len(runs) > 1 else iter(runs[0] if runs else ())


def list_folder(folder: Path) -> Listing:
    """Walk `folder` and sort every file into pictures, caption files, metadata, or a problem that names it.

    Links are followed only to files inside the folder; links to folders never. Hidden entries are left aside.

    Raises:
        UsageError: `folder` is not there or not a folder.
    """
    root = Path(folder)
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "is not there"
        raise UsageError(
            f"{shown(str(folder))} {what}; give the folder that holds the pictures"
            + (" (archives, parquet and TOML files: finetune data import)." if root.exists() else ".")
        )
    listing = Listing(root.resolve())
    pictures, sidecars, folded = Shelf[str](), Shelf[str](), Index()
    for name in _in_order(_walk(listing.root, "", listing.problems)):
        ending = suffix(name)
        if ending in SUFFIXES:
            pictures.append(name)
            folded.add(_folded(name))
            listing.problems.extend(_odd_name(name))
        elif ending in SIDECARS:
            sidecars.append(name)
        else:
            _sort_in(name, listing)
    listing.problems.sort(key=lambda problem: _rank(problem.file_name))
    listing.pictures, listing.sidecars = pictures, sidecars
    _leave_aside_other_json(listing)
    listing.problems.extend(_case_clashes(pictures, folded))
    found = find_masks(listing.pictures)
    listing.masks, no_pictures = found.of, found.files()
    if no_pictures:
        listing.pictures = Shelf(name for name in listing.pictures if name not in no_pictures)
    listing.problems.extend(found.problems)
    return listing


def _walk(root: Path, inside: str, problems: list[Problem]) -> Iterator[str]:
    """Relative names of all usable regular files, in no order; the rest goes to `problems`."""
    folders = []
    try:
        with os.scandir(root / inside) as entries:
            for entry in entries:
                if entry.name == OWN:
                    continue
                name = f"{inside}/{entry.name}" if inside else entry.name
                problem = _unusable(root, name, entry)
                if problem is not None:
                    problems.append(problem)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                else:
                    yield name
    except OSError as error:
        problems.append(
            Problem(
                inside or ".",
                f"this folder cannot be read ({error.strerror})",
                "what is in it stays unknown",
                "mend its permissions, or move it away",
                code=STORAGE,
            )
        )
    for name in folders:
        if suffix(name) in SUFFIXES:
            problems.append(
                Problem(
                    name,
                    "is a folder named like a picture",
                    "the pictures inside it are read",
                    "rename it if that is not meant",
                    "note",
                )
            )
        yield from _walk(root, name, problems)


def _unusable(root: Path, name: str, entry: os.DirEntry[str]) -> Problem | None:
    """Why this entry is not even looked at, or None."""
    if entry.name.startswith("."):
        return Problem(
            name,
            "is hidden (its name starts with a dot)",
            "systems and editors keep their own files so",
            "rename it if it belongs to the dataset",
            "note",
        )
    try:
        entry.name.encode("utf-8")
    except UnicodeEncodeError:
        return Problem(name, "has a name that is not UTF-8", "no manifest can name it", "rename it")
    if entry.is_symlink():
        return _bad_link(root, name)
    # keep: these two cost nothing; asking for the mode is a question to the file system for every file.
    if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False):
        return None
    kind = kind_of(entry.stat(follow_symlinks=False).st_mode)
    if kind is None:
        return None
    usable = suffix(name) in (*SUFFIXES, *SIDECARS)
    return not_regular(kind).problem(name, "error" if usable else "note")


def _bad_link(root: Path, name: str) -> Problem | None:
    """Why a symbolic link is refused; None when it leads to a regular file inside the folder."""
    path = root / name
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(root):
        return Problem(
            name,
            "is a link that leads out of the folder",
            "only files inside the folder are read",
            "copy the file here in place of the link",
            code=UNSAFE,
        )
    if not os.path.exists(path):
        return Problem(
            name, "is a broken link", "the file it points to is not there", "remove it, or restore its target"
        )
    if target.is_dir():
        return Problem(
            name,
            "is a link to a folder",
            "its pictures would be counted twice",
            "remove it; repeats belong in the manifest or in a kohya folder name",
            "warning",
        )
    kind = kind_of(target.stat().st_mode)
    return None if kind is None else not_regular(kind).problem(name)


def _sort_in(name: str, listing: Listing) -> None:
    """A file that is neither a picture nor a caption file."""
    if name in METADATA:
        listing.metadata.append(name)
    elif name.rpartition("/")[2] in METADATA:
        listing.problems.append(
            Problem(
                name,
                "is metadata in a subfolder",
                "only the one in the top folder is read",
                "move its rows there, with file_name relative to the top folder",
                "warning",
            )
        )
    else:
        listing.problems.append(_left_aside(name))


def _left_aside(name: str) -> Problem:
    return Problem(
        name,
        f"is left aside ({suffix(name) or 'no file ending'})",
        "its ending is not a picture's",
        "convert or rename it if it is a picture (.jpg, .png, .webp, .tif, .gif, .bmp, .avif)",
        "note",
    )


def _leave_aside_other_json(listing: Listing) -> None:
    """A .json file belongs to the dataset only beside a picture of its name."""
    if not any(name.lower().endswith(".json") for name in listing.sidecars):
        return
    pictures = Lookup(listing.pictures, stem)
    other = {name for name in listing.sidecars if name.lower().endswith(".json") and not pictures(stem(name))}
    listing.sidecars = Shelf(name for name in listing.sidecars if name not in other)
    listing.problems.extend(_left_aside(name) for name in order(other))


def _case_clashes(names: Sequence[str], folded: Index) -> Iterator[Problem]:
    """Names that become one file on Windows and macOS."""
    same = defaultdict(list)
    for place in folded.repeated():
        same[_folded(names[place])].append(names[place])
    for group in same.values():
        for name in group[1:]:
            yield Problem(
                name,
                f"differs from {group[0]} only in upper and lower case or in Unicode form",
                "on Windows and macOS one of them overwrites the other",
                "rename one",
                "warning",
            )


def _folded(name: str) -> str:
    return (name if name.isascii() else unicodedata.normalize("NFC", name)).casefold()


def _odd_name(name: str) -> Iterator[Problem]:
    """What other systems and libraries make of a name; from some `datasets` guesses a split and leaves out the rest."""
    if WINDOWS.search(name):
        yield Problem(
            name,
            "has a name that Windows cannot hold",
            "unpacked there, the picture is renamed or lost, and its row names nothing",
            'leave out < > : " | ? * \\, a blank or dot at the end, and names such as CON',
            "note",
        )
    found = SPLIT_WORD.search(name)
    if found is not None:
        yield Problem(
            name,
            f"has the word {found[1]!r} in its path",
            "harmless here, but load_dataset('imagefolder') would take it for a split and drop captions",
            "rename it, or load the folder elsewhere with data_files='**'",
            "note",
        )


def inside(name: object) -> str | None:
    """`name` in plain relative form, or None when it is no path inside the folder (absolute, `..`, a URL)."""
    if not isinstance(name, str) or not name.strip() or "\0" in name or "://" in name:
        return None
    # keep: on Windows "C:x" leaves the folder without any slash; elsewhere it is an ordinary name.
    if os.name == "nt" and PureWindowsPath(name).drive:
        return None
    if "\\" not in name and not {"", ".", ".."} & set(name.split("/")):
        return name
    path = PurePosixPath(name)
    windows = "\\" in name and (name[1:2] == ":" or ".." in name.split("\\") or name.startswith("\\"))
    if path.is_absolute() or ".." in path.parts or windows:
        return None
    return str(path)
