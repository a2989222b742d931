"""Measuring every picture of a folder, in threads, and only once while its bytes stay the same."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from PIL import Image

from data_tools.errors import DataToolsError, Problem, RefusedError, StorageError, grouped
from data_tools.files import read_regular, storage_errors
from data_tools.fingerprints import sha256
from data_tools.images import DECODER, MAX_FILE_BYTES, WHITE, Color, color_name, decode
from data_tools.inspection import Progress
from data_tools.memory import default_folder
from data_tools.quality import VERSION, Measures, measure
from data_tools.records import ImageRecord

Thing = TypeVar("Thing")
Done = TypeVar("Done")


class MeasureMemory:
    """Measures by the digest of the file they are of: lines appended to a file outside of the pictures' folder."""

    def __init__(self, root: Path, background: Color = WHITE, folder: Path | None = None) -> None:
        """Read what is known; without a writable place nothing is remembered, and everything works.

        Args:
            root: the dataset folder.
            background: what transparent pixels were measured on.
            folder: where it lies; the user's cache if None, see `memory.default_folder`.
        """
        key = f"{os.path.realpath(root)}\n{color_name(background)}\n{DECODER}\n{VERSION}"
        name = sha256(key.encode(errors="surrogateescape"))[:24]
        self.path = (folder or default_folder()) / "measures" / f"{name}.jsonl"
        self.known: dict[str, Measures] = {}
        self._file: int | None = None
        with contextlib.suppress(StorageError), storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._read(self.path.read_bytes())

    def _read(self, data: bytes) -> None:
        if data and not data.endswith(b"\n") and self._file is not None:
            os.write(self._file, b"\n")
        for line in data.splitlines():
            # keep: a line torn by a kill is no entry; its picture is measured again.
            with contextlib.suppress(ValueError, TypeError, KeyError):
                digest, values = json.loads(line)
                self.known[digest] = Measures(**values)

    def keep(self, digest: str, measures: Measures) -> None:
        """Remember; a full disk only means that it is measured again next time."""
        self.known[digest] = measures
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.write(self._file, json.dumps([digest, asdict(measures)], separators=(",", ":")).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def measure_all(
    root: Path,
    records: Sequence[ImageRecord],
    *,
    background: Color = WHITE,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Measures]:
    """The measures of every picture, in order; those that are known are not decoded again.

    Args:
        root: the dataset folder.
        records: of pictures in it.
        background: red, green, blue shown where a picture is transparent.
        workers: threads that decode; None means one per CPU core, at most 8.
        progress: called as (done, total), from the calling thread.

    Raises:
        DataToolsError: naming every picture that has changed or vanished since it was scanned.
    """
    memory = MeasureMemory(root, background)

    def work(record: ImageRecord) -> Measures | Problem:
        known = memory.known.get(record.sha256)
        if known is not None:
            return known
        try:
            found = measure(decode_again(root, record, background))
        except RefusedError as refusal:
            return refusal.problem(record.file_name)
        memory.keep(record.sha256, found)
        return found

    results = []
    try:
        for result in in_threads(work, records, workers):
            results.append(result)
            if progress is not None:
                progress(len(results), len(records))
    finally:
        memory.close()
    problems = [result for result in results if isinstance(result, Problem)]
    if problems:
        raise DataToolsError("These pictures cannot be measured:", grouped(problems))
    return [result for result in results if isinstance(result, Measures)]


def decode_again(root: Path, record: ImageRecord, background: Color) -> Image.Image:
    """The picture of a record, upright RGB.

    Raises:
        RefusedError: it cannot be read any more, or holds other bytes than when it was scanned.
    """
    data = read_regular(root / record.file_name, MAX_FILE_BYTES)
    if sha256(data) != record.sha256:
        raise RefusedError("changed just now", "it is another picture than was scanned", "run this again")
    return decode(data, background)[0]


def in_threads(work: Callable[[Thing], Done], things: Sequence[Thing], workers: int | None) -> Iterator[Done]:
    """Results in order, a few things ahead, so that a million pictures are not a million waiting tasks.

    `workers` None means one thread per CPU core, at most 8: each may hold a 64 MP picture several times over.
    """
    threads = workers or min(8, os.cpu_count() or 1)
    ahead: list[Future[Done]] = []
    pool = ThreadPoolExecutor(threads)
    try:
        for thing in things:
            ahead.append(pool.submit(work, thing))
            if len(ahead) > 4 * threads:
                yield ahead.pop(0).result()
        for future in ahead:
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
