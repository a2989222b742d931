"""Captions of a whole folder changed at once, shown beforehand as a diff, and taken back again.

Edited is where captions stand as text: .txt and .caption files, and the text of metadata.jsonl. What files held before
lies in the folder's own `.finetune`, so that the last edit, and the one before it, can be undone.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.captioners.columns import TEXT_COLUMNS
from data_tools.errors import DataToolsError, Problem, RefusedError, UsageError, shown, stop_for_errors
from data_tools.files import read_regular, storage_errors, write_atomic
from data_tools.fingerprints import sha256
from data_tools.folder import OWN, Listing, inside
from data_tools.inspection import Progress
from data_tools.names import stem, suffix
from data_tools.rows import json_object
from data_tools.text import LINE_END, MAX_CAPTION_BYTES, MAX_TEXT_BYTES, decode_text, split_captions
from data_tools.wording import Wording

EDITS = f"{OWN}/edits"
MANIFEST = "metadata.jsonl"
TEXT = (".txt", ".caption")


@dataclass(frozen=True)
class Edit:
    """What is done to every caption, in the order of the fields; patterns aside, doing it twice is doing it once."""

    patterns: tuple[tuple[re.Pattern[str], str], ...] = ()
    """Regular expressions and what replaces them."""
    remove: tuple[str, ...] = ()
    """Tags (what stands between two commas) that are taken out, in any case of letters."""
    add: tuple[str, ...] = ()
    """Tags that are put at the end where they are missing."""
    wording: Wording = field(default_factory=Wording)

    def __call__(self, caption: str) -> str:
        """The caption as it is to be."""
        for pattern, new in self.patterns:
            caption = pattern.sub(new, caption)
        if self.remove or self.add:
            tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
            gone, there = {tag.casefold() for tag in self.remove}, {tag.casefold() for tag in tags}
            left = [tag for tag in tags if tag.casefold() not in gone]
            left += [tag for tag in self.add if tag.casefold() not in there]
            caption = caption if left == tags else ", ".join(left)
        return self.wording(caption)


def parse_pattern(text: str) -> tuple[re.Pattern[str], str]:
    """sed's s/OLD/NEW/ (any delimiter) -> a regular expression and what replaces it.

    Raises:
        UsageError: it is not of that form, or no regular expression.
    """
    parts = text[2:].split(text[1]) if len(text) > 3 and text[0] == "s" and not text[1].isalnum() else []
    if len(parts) != 3 or not parts[0] or parts[2]:
        raise UsageError(f"--regex {text!r} is not of the form s/OLD/NEW/ (or with another delimiter, s|OLD|NEW|).")
    try:
        pattern = re.compile(parts[0])
        pattern.sub(parts[1], "")
    except (re.error, IndexError) as error:
        raise UsageError(f"--regex {text!r} cannot be followed ({error}).") from error
    return pattern, parts[1]


@dataclass(frozen=True)
class Change:
    """One caption before and after."""

    place: str
    """The file, for metadata.jsonl with the picture."""
    old: str
    new: str


@dataclass
class Plan:
    """What an edit would do."""

    changes: list[Change] = field(default_factory=list)
    files: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    """File -> its bytes before and after; only files that change."""
    problems: list[Problem] = field(default_factory=list)
    seen: int = 0
    """Captions that were looked at."""


def plan(listing: Listing, edit: Edit, only: str | None = None) -> Plan:
    """Look at every caption; nothing is written.

    Args:
        listing: the folder.
        edit: what is done.
        only: a pattern of picture names, such as "10_sks dog/*"; None means all.
    """
    found = Plan()
    pictures: dict[str, list[str]] = defaultdict(list)
    for name in listing.pictures:
        pictures[stem(name)].append(name)

    def wanted(names: list[str]) -> bool:
        return bool(names) and (only is None or any(fnmatch.fnmatch(name, only) for name in names))

    for name in listing.sidecars:
        if wanted(pictures[stem(name)]):
            _edit_file(listing.root, name, edit, found, _in_text if suffix(name) in TEXT else None)
    for name in listing.metadata:
        rewrite = _in_rows(lambda picture: wanted([picture]))
        _edit_file(listing.root, name, edit, found, rewrite if name == MANIFEST else None)
    return found


Rewrite = Callable[[str, str, Edit, Plan], str]
"""Name and text of a file, the edit, and where changes are noted -> the new text."""


def _edit_file(root: Path, name: str, edit: Edit, found: Plan, rewrite: Rewrite | None) -> None:
    if rewrite is None:
        found.problems.append(
            Problem(name, "is not edited", "only text files and metadata.jsonl are", "change it by hand", "warning")
        )
        return
    try:
        before = read_regular(root / name, MAX_TEXT_BYTES if name == MANIFEST else MAX_CAPTION_BYTES)
        text = decode_text(before)
        after = rewrite(name, text, edit, found)
    except RefusedError as refusal:
        found.problems.append(refusal.problem(name))
        return
    if after != text:
        found.files[name] = (before, after.encode())


def _in_text(name: str, text: str, edit: Edit, found: Plan) -> str:
    return "\n".join(_edited(name, line, edit, found) for line in LINE_END.split(text))


def _in_rows(wanted: Callable[[str], bool]) -> Rewrite:
    def rewrite(name: str, text: str, edit: Edit, found: Plan) -> str:
        return "\n".join(_row(name, line, edit, found) for line in text.split("\n"))

    def _row(name: str, line: str, edit: Edit, found: Plan) -> str:
        values = json_object(line) if line.strip() else {}
        picture = str(values.get("file_name"))
        column = next((column for column in TEXT_COLUMNS if isinstance(values.get(column), str)), None)
        if column is None or not wanted(picture):
            return line
        old = values[column]
        new = "\n".join(_edited(f"{name}, {picture}", part, edit, found) for part in LINE_END.split(old))
        return line if new == old else json.dumps({**values, column: new}, ensure_ascii=False)

    return rewrite


def _edited(place: str, caption: str, edit: Edit, found: Plan) -> str:
    """One caption, noted where it changes; a blank line stays one.

    Raises:
        RefusedError: it would become something that is no caption.
    """
    if not caption.strip():
        return caption
    found.seen += 1
    new = edit(caption.strip())
    if new == caption.strip():
        return caption
    split_captions(new)
    found.changes.append(Change(place, caption.strip(), new))
    return new


def apply(root: Path, planned: Plan, progress: Progress | None = None) -> None:
    """Keep what the files held, then write them, each whole or not at all; killed in between, both can be repeated.

    Raises:
        StorageError: the disk is full or does not allow it; what was written can be undone.
    """
    entries = {
        name: {"before": before.decode("utf-8", "surrogateescape"), "after": sha256(after)}
        for name, (before, after) in planned.files.items()
    }
    kept = _edits(root)
    mark = root / EDITS / f"{int(kept[-1].stem) + 1 if kept else 1:04d}.json"
    with storage_errors(mark):
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(mark, json.dumps(entries).encode())
    _write(root, {name: after for name, (_, after) in planned.files.items()}, progress)


def _write(root: Path, files: Mapping[str, bytes], progress: Progress | None) -> None:
    for done, (name, data) in enumerate(files.items(), start=1):
        with storage_errors(root / name):
            write_atomic(root / name, data)
        if progress is not None:
            progress(done, len(files))


def undo(root: Path, *, write: bool, progress: Progress | None = None) -> list[str]:
    """Give the files of the last edit back what they held before; their names.

    Raises:
        UsageError: there is no edit to undo.
        DataToolsError: naming every file that was changed since then; nothing is written.
        StorageError: the disk is full or does not allow it; the same command goes on.
    """
    kept = _edits(root)
    if not kept:
        raise UsageError(f"There is no edit of {shown(str(root))} to undo.")
    try:
        entries = json.loads(kept[-1].read_text(encoding="utf-8"))
        before = {name: entry["before"].encode("utf-8", "surrogateescape") for name, entry in entries.items()}
        after = {name: str(entry["after"]) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataToolsError(
            f"{shown(str(kept[-1]))} is damaged ({error!r}); remove it to undo the edit before it."
        ) from error
    stop_for_errors("The last edit is not undone:", _changed_since(root, before, after))
    if write:
        _write(root, before, progress)
        kept[-1].unlink()
    return list(before)


def _changed_since(root: Path, before: dict[str, bytes], after: dict[str, str]) -> Iterator[Problem]:
    for name, data in before.items():
        try:
            if inside(name) != name:
                raise RefusedError("leads out of the folder", "an edit changes files of its folder only", "look at it")
            now = sha256(read_regular(root / name, MAX_TEXT_BYTES))
            if now not in (after[name], sha256(data)):
                raise RefusedError("was changed since", "undoing would lose that change", "edit it by hand")
        except RefusedError as refusal:
            yield refusal.problem(name)


def _edits(root: Path) -> list[Path]:
    return sorted(path for path in (root / EDITS).glob("*.json") if path.stem.isdecimal())
