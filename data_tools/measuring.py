"""Numbers about every picture of a folder, each found once while the picture's bytes stay the same."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from data_tools.errors import Problem, RefusedError, stop_for_errors
from data_tools.files import read_regular
from data_tools.fingerprints import sha256
from data_tools.images import DECODER, MAX_FILE_BYTES, WHITE, Color, color_name, decode
from data_tools.inspection import Progress
from data_tools.memory import Numbers
from data_tools.pool import death, in_workers
from data_tools.processes import ALONE, Share, wait_for_others
from data_tools.quality import VERSION, Measures, measure
from data_tools.records import ImageRecord

Count = Callable[[Sequence[ImageRecord]], Iterator[dict[str, Any] | Problem]]
"""Finds the numbers of pictures, in order; or why one of them has none."""


def measure_all(
    root: Path,
    records: Sequence[ImageRecord],
    *,
    background: Color = WHITE,
    workers: int | None = None,
    progress: Progress | None = None,
    share: Share = ALONE,
) -> list[Measures]:
    """The measures of every picture, in order; those that are known are not decoded again.

    Args:
        root: the dataset folder.
        records: of pictures in it; of this process's share, where it is not the first.
        background: red, green, blue shown where a picture is transparent.
        workers: how many decode at once; None: see `pool.count_of`.
        progress: called as (done, total), from the calling thread.
        share: which process this is.

    Raises:
        DataToolsError: naming every picture that has changed or vanished since it was scanned.
    """

    def work(record: ImageRecord) -> dict[str, Any] | Problem:
        try:
            return asdict(measure(decode_again(root, record, background)))
        except RefusedError as refusal:
            return refusal.problem(record.file_name)

    def count(missing: Sequence[ImageRecord]) -> Iterator[dict[str, Any] | Problem]:
        return in_workers(work, missing, workers, lambda record, code: death(record.file_name, code))

    key = f"{os.path.realpath(root)}\n{color_name(background)}\n{DECODER}\n{VERSION}"
    return [Measures(**numbers) for numbers in numbers_of(records, Numbers("measures", key, share), count, progress)]


def numbers_of(
    records: Sequence[ImageRecord], memory: Numbers, count: Count, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """The numbers of every picture, in order: known ones, those of this process's share, those of the others.

    The memory is closed. A process that is not the first is given its share of the records and leaves the numbers in
    the memory.

    Raises:
        DataToolsError: naming every picture without numbers.
    """
    problems: list[Problem] = []
    missing = {record.file_name: record for record in records if record.sha256 not in memory.known}

    done = itertools.count(len(records) - len(missing) + 1)

    def find(names: Sequence[str]) -> None:
        wanted = [missing[name] for name in names]
        for record, numbers in zip(wanted, count(wanted), strict=True):
            if isinstance(numbers, Problem):
                problems.append(numbers)
            else:
                memory.keep(record.sha256, numbers)
            if progress is not None:
                progress(next(done), len(records))

    def known(name: str) -> bool:
        return missing[name].sha256 in memory.known

    try:
        mine = memory.share.of(missing)
        find(mine)
        others = sorted({*missing} - {*mine})
        wait_for_others(others, known, memory.refresh)
        find([name for name in others if not known(name)])
    finally:
        memory.close()
    stop_for_errors("These pictures cannot be measured:", problems)
    return [memory.known[record.sha256] for record in records]


def decode_again(root: Path, record: ImageRecord, background: Color) -> Image.Image:
    """The picture of a record, upright RGB.

    Raises:
        RefusedError: it cannot be read any more, or holds other bytes than when it was scanned.
    """
    data = read_regular(root / record.file_name, MAX_FILE_BYTES)
    if sha256(data) != record.sha256:
        raise RefusedError("changed just now", "it is another picture than was scanned", "run this again")
    return decode(data, background)[0]
