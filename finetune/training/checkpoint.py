"""Checkpoints that survive being killed: written beside, proved by digests, renamed; the newest whole one is read.

    checkpoint-000500/
        adapter.safetensors  ema.safetensors                            adapters with their header, as exports read them
        optimizer.safetensors                                           tensors, by name
        state.json                                                      where the run stands: TrainState
        run.json  optimizer.json  ...                                   documents
        manifest.json                                                   size and SHA-256 of all others; written last

A folder under such a name was fsynced before it got the name. Whoever calls `save_checkpoint` holds the
folder's lock; reading needs none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_tools.errors import counted
from finetune.errors import CheckpointError, StorageError
from finetune.run_files import RUN_FILE
from finetune.storage import atomic_dir, read_safetensors, sha256_file, write_json, write_safetensors

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""Layout version, stored in every manifest; raise it when an older reader would misread the files."""
MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d{6,})")
"""Everything else in the folder is somebody else's and is never read, counted or deleted."""
ROOM = 1 << 20
"""Bytes that a checkpoint needs besides its tensors: headers, documents, folders."""
LEFTOVER = re.compile(r"\.checkpoint-\d{6,}\.(part|old)-\d+(-[0-9a-f]{8})?")
"""What a killed writer leaves behind."""


@dataclass(frozen=True)
class TrainState:
    """Where a run stands; everything else follows from this and the run.

    Attributes:
        step: optimizer steps done.
        samples_seen: pictures trained on, over all processes.
        epoch: the epoch that the next picture belongs to, from 0.
        seconds: training time so far, over all starts of the run.
    """

    step: int
    samples_seen: int
    epoch: int
    seconds: float


@dataclass(frozen=True)
class Found:
    """A checkpoint whose every digest was right.

    Attributes:
        tensors: file stem -> name -> tensor on the CPU; a file is read when it is asked for.
        documents: file stem -> JSON document.
        skipped: one line for each newer checkpoint that is damaged, naming the file.
    """

    path: Path
    state: TrainState
    tensors: Mapping[str, dict[str, Tensor]]
    documents: Mapping[str, dict[str, Any]]
    skipped: tuple[str, ...] = ()


class Savable(Protocol):
    """Tensors that write themselves with a header of their own, such as an adapter."""

    tensors: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        ...


Contents = Mapping[str, "Tensor"] | Savable
"""What one tensor file of a checkpoint holds."""


class TensorFiles(Mapping[str, "dict[str, Tensor]"]):
    """Safetensors files by stem, read one at a time, because together they may not fit into memory twice."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = {path.stem: path for path in paths}

    def __getitem__(self, stem: str) -> dict[str, Tensor]:
        return read_safetensors(self._paths[stem])[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def never(step: int) -> bool:
    """No checkpoint is spared."""
    return False


def save_checkpoint(
    folder: Path,
    state: TrainState,
    tensors: Mapping[str, Contents],
    documents: Mapping[str, Mapping[str, Any]],
    keep: int,
    spare: Callable[[int], bool] = never,
) -> Path:
    """Write `folder/checkpoint-<step>` whole or not at all, then delete old ones.

    A whole checkpoint of the same step is left alone: the same step of the same run holds the same bytes. A
    damaged one is replaced. Whether the disk has room is asked first.

    Args:
        tensors: file stem -> name -> tensor, or what writes itself.
        documents: file stem -> JSON document; "state" and "manifest" are taken.
        keep: how many checkpoints up to this step remain, at least 1; the new one is among them.
        spare: whether a checkpoint of some step stays besides those.

    Raises:
        StorageError: if the disk is full or cannot be written; older checkpoints are then untouched.
    """
    assert keep >= 1, f"keep is {keep}, but the new checkpoint must stay"
    assert not {"state", "manifest"} & documents.keys(), "these documents are written here"
    clean(folder)
    target = folder / _name(state.step)
    if not target.exists() or _damage(target) is not None:
        try:
            check_room(folder, target, sum(map(_bytes, tensors.values())))
            with atomic_dir(target) as part:
                _fill(part, tensors, {**documents, "state": asdict(state)})
        except StorageError as error:
            previous = [path.name for _, path in _checkpoints(folder)]
            rest = f"untouched on disk: {', '.join(previous)}" if previous else "there is no earlier one"
            raise StorageError(f"{target} cannot be saved; {rest}.", error.problems) from error
    _prune(folder, state.step, keep, spare)
    return target


def check_room(folder: Path, target: Path, needed: int) -> None:
    """Refuse to begin a write of `needed` bytes that the disk has no room for.

    Raises:
        StorageError: with what is needed and what is free.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed + ROOM:
        raise StorageError(
            f"The disk is full: {target} needs {(needed + ROOM) / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free.",
            [
                f"free some space in {existing}, lower checkpoint.keep, or move the run folder to a larger disk: the "
                "same command goes on there"
            ],
        )


def _bytes(contents: Contents) -> int:
    tensors = contents if isinstance(contents, Mapping) else contents.tensors
    return sum(tensor.nbytes for tensor in tensors.values())


def latest_checkpoint(folder: Path) -> Found | None:
    """The checkpoint with the highest step among those that are whole; None if there are none at all.

    Times of files play no part, and nothing is changed on disk.

    Raises:
        CheckpointError: if there are checkpoints but none is whole, or if the newest was written by another
            version.
    """
    skipped: list[str] = []
    for _, path in reversed(_checkpoints(folder)):
        damage = _damage(path)
        if damage is None:
            return _load(path, tuple(skipped))
        skipped.append(damage)
    if skipped:
        raise CheckpointError(
            f"{folder} holds {counted(len(skipped), 'checkpoint')}, and every one is damaged:",
            [*skipped, "copy an intact checkpoint back, or start again in another output_dir."],
        )
    return None


def newest_run(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Name and run.json of the newest checkpoint where that document is whole; no tensor is read, so this is quick."""
    for _, path in reversed(_checkpoints(folder)):
        try:
            manifest = _read_json(path / MANIFEST)
            files = manifest["files"]
            if manifest["sha256"] == _digest(files) and sha256_file(path / RUN_FILE) == files[RUN_FILE]["sha256"]:
                return path.name, _read_json(path / RUN_FILE)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def checkpoint_at(folder: Path, step: int) -> Found:
    """The checkpoint of one step.

    Raises:
        CheckpointError: if there is none, naming those there are, or if it is damaged.
    """
    path = folder / _name(step)
    if not path.is_dir():
        there = ", ".join(str(found) for found, _ in _checkpoints(folder)) or "none"
        raise CheckpointError(f"{folder} holds no checkpoint of step {step}; there are: {there}.")
    damage = _damage(path)
    if damage is not None:
        raise CheckpointError(f"{damage} Name another step, or copy it back.")
    return _load(path, ())


def checkpoint_adapter(folder: Path, which: str) -> Path:
    """The adapter that a checkpoint would export: its running mean if it has one. Every digest was right.

    Args:
        folder: the run folder.
        which: a step, "last", or "best" by validation.

    Raises:
        CheckpointError: if there is no such checkpoint, naming those there are, or if it is damaged.
    """
    found = latest_checkpoint(folder) if which in ("last", "best") else None
    if which.isdecimal():
        found = checkpoint_at(folder, int(which))
    elif found is None:
        raise CheckpointError(f"{folder} has no checkpoint {which!r}; name a step, last or best.")
    elif which == "best":
        best = found.documents.get("validation", {}).get("best")
        if best is None:
            raise CheckpointError(f"{folder} was not validated yet, so no checkpoint is the best; name a step.")
        found = checkpoint_at(folder, best)
    return found.path / ("ema.safetensors" if "ema" in found.tensors else "adapter.safetensors")


def clean(folder: Path) -> list[Path]:
    """Remove what killed writers left behind, and say what that was; only for who holds the folder's lock."""
    found = [path for path in folder.iterdir() if LEFTOVER.fullmatch(path.name)] if folder.is_dir() else []
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return found


def _load(path: Path, skipped: tuple[str, ...]) -> Found:
    files = [path / name for name in _read_json(path / MANIFEST)["files"]]
    documents = {file.stem: _read_json(file) for file in files if file.suffix == ".json"}
    tensors = TensorFiles(file for file in files if file.suffix == ".safetensors")
    return Found(path, TrainState(**documents["state"]), tensors, documents, skipped)


def _fill(part: Path, tensors: Mapping[str, Contents], documents: Mapping[str, Mapping[str, Any]]) -> None:
    for stem, contents in tensors.items():
        if isinstance(contents, Mapping):
            write_safetensors(part / f"{stem}.safetensors", contents, {})
        else:
            contents.save(part / f"{stem}.safetensors")
    for stem, document in documents.items():
        write_json(part / f"{stem}.json", document)
    written = sorted(part.iterdir())
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in written}
    write_json(part / MANIFEST, {"format": FORMAT, "files": files, "sha256": _digest(files)})


def _prune(folder: Path, step: int, keep: int, spare: Callable[[int], bool]) -> None:
    """Delete all but the newest `keep` up to `step` and the spared; later ones are damaged, or the run would be there.

    Renamed before they are deleted: a kill in between must not leave half a checkpoint under a good name.
    """
    reached = [(found, path) for found, path in _checkpoints(folder) if found <= step]
    for path in [path for found, path in reached[:-keep] if not spare(found)]:
        doomed = path.with_name(f".{path.name}.old-{os.getpid()}")
        try:
            os.rename(path, doomed)
        except OSError as error:
            raise StorageError(
                f"{path} cannot be removed: {error.strerror}.",
                [f"{_name(step)} is saved; check the folder's permissions and that its disk is there."],
            ) from error
        shutil.rmtree(doomed, ignore_errors=True)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything named like a checkpoint, by step."""
    if not folder.is_dir():
        return []
    named = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every byte is as it was written.

    Raises:
        CheckpointError: if it is whole but of another format: to fall back to an older one would lose work
            silently.
    """
    try:
        manifest = _read_json(path / MANIFEST)
        files: dict[str, Any] = manifest["files"]
        if manifest["sha256"] != _digest(files):
            return f"{path.name}/{MANIFEST} is damaged: it does not match its own SHA-256."
    except FileNotFoundError:
        return f"{path.name}/{MANIFEST} is missing."
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path.name}/{MANIFEST} is damaged: {error}."
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is written in format {manifest.get('format')}, and this version reads format {FORMAT}.",
            ["resume with the version of finetune that wrote it, or choose another output_dir."],
        )
    for problem in _wrong_files(path, files):
        return problem
    return None


def _wrong_files(path: Path, files: dict[str, Any]) -> Iterator[str]:
    for name, expected in files.items():
        try:
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                yield f"{path.name}/{name} is damaged: {size:,} bytes instead of {expected['bytes']:,}."
            elif (digest := sha256_file(path / name)) != expected["sha256"]:
                yield (
                    f"{path.name}/{name} is damaged: its SHA-256 is {digest[:12]}... "
                    f"instead of {expected['sha256'][:12]}...."
                )
        except FileNotFoundError:
            yield f"{path.name}/{name} is missing."
        except OSError as error:
            yield f"{path.name}/{name} cannot be read: {error.strerror}."
    if "state.json" not in files:
        yield f"{path.name}/{MANIFEST} does not list state.json."
    elif path.name != _name(step := _read_json(path / "state.json")["step"]):
        yield f"{path.name}/state.json is of step {step}: the folder was renamed."


def _name(step: int) -> str:
    return f"checkpoint-{step:06d}"


def _digest(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_bytes())
    if not isinstance(document, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return document
