"""Tables whose rows hold pictures: parquet files, datasets on the hub, datasets saved to disk. All streamed."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.captioners.columns import TAGS, TEXT_COLUMNS
from data_tools.errors import DataToolsError, Problem, UsageError, shown
from data_tools.rows import plain
from data_tools.sources.base import File, Order

IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
"""The first that is there holds the pictures; else the first column whose values are picture bytes."""
ROWS, PAGE = 16, 2**20
"""Rows of a parquet file, and bytes of a column of it, that are read at once."""
HUB = "hub:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Where a picture's kind is told by its first bytes: (offset, bytes) -> ending.
MAGIC = (
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"\x89PNG", ".png"),
    (0, b"GIF8", ".gif"),
    (8, b"WEBP", ".webp"),
    (0, b"BM", ".bmp"),
    (0, b"II*\0", ".tif"),
    (0, b"MM\0*", ".tif"),
    (4, b"ftypavi", ".avif"),
    (4, b"ftyp", ".heic"),
)


class Parquet:
    """Parquet files as the hub stores them: one picture and its columns a row."""

    summary = "a .parquet file, or a folder of them"

    def recognises(self, place: str) -> bool:
        """A file with that ending, or a folder that holds such files and no metadata.parquet."""
        return bool(_parquet_files(Path(place).expanduser()))

    def read(self, order: Order) -> Iterator[File | Problem]:
        """The rows of all files in the order of their names."""
        parquet = importlib.import_module("pyarrow.parquet")
        yield from _files(_parquet_rows(parquet, _parquet_files(order.path)), order)


class Saved:
    """What `datasets.Dataset.save_to_disk` wrote."""

    summary = "a folder written by datasets' save_to_disk"

    def recognises(self, place: str) -> bool:
        """By the two files every such folder has."""
        folder = Path(place).expanduser()
        return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()

    def read(self, order: Order) -> Iterator[File | Problem]:
        """All rows."""
        datasets = importlib.import_module("datasets")
        try:
            table = datasets.load_from_disk(str(order.path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataToolsError(
                f"{shown(order.place)} cannot be read by datasets ({shown(str(error))}); save it again."
            ) from error
        yield from _files(_undecoded(datasets, table), order)


class Hub:
    """A dataset of the hub, streamed through the `datasets` library; its code is never run."""

    summary = "a dataset on the hub: hub:owner/name (with --split)"

    def recognises(self, place: str) -> bool:
        """`hub:...`, or owner/name where no such path exists."""
        return place.startswith(HUB) or (HUB_ID.fullmatch(place) is not None and not Path(place).exists())

    def read(self, order: Order) -> Iterator[File | Problem]:
        """The rows of one split, as they arrive."""
        datasets = importlib.import_module("datasets")
        name = order.place.removeprefix(HUB)
        try:
            table = datasets.load_dataset(name, split=order.split, streaming=True)
            yield from _files(_fetched(_undecoded(datasets, table)), order)
        except DataToolsError:
            raise
        # keep: hub, network and dataset scripts raise nearly anything, and all of it is about this place.
        except Exception as error:
            reason = shown(str(error).splitlines()[0]) if str(error) else "no reason given"
            raise UsageError(
                f"{shown(name)} (split {order.split}) cannot be read from the hub ({type(error).__name__}: {reason}); "
                "check the name and --split. Without a network, fetch it once elsewhere and import that folder: "
                f"hf download --repo-type dataset {shown(name)} --local-dir FOLDER."
            ) from error


def _parquet_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix.lower() == ".parquet" else []
    if not path.is_dir() or (path / "metadata.parquet").exists():
        return []
    return sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))


def _parquet_rows(parquet: Any, paths: Iterable[Path]) -> Iterator[Mapping[str, Any]]:
    for path in paths:
        try:
            # keep: read page by page, group by group and row by row, because a row holds a whole picture, and by itself
            # pyarrow reads ahead through the whole file.
            table = parquet.ParquetFile(path, pre_buffer=False, buffer_size=PAGE)
            for group in range(table.num_row_groups):
                for batch in table.iter_batches(ROWS, row_groups=[group]):
                    yield from (batch.slice(row, 1).to_pylist()[0] for row in range(batch.num_rows))
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise DataToolsError(
                f"{shown(str(path))} is no readable parquet ({shown(str(error).splitlines()[0])}); fetch it again. "
                "What was read before stays."
            ) from error


def _undecoded(datasets: Any, table: Any) -> Iterator[Mapping[str, Any]]:
    """Rows with pictures as stored bytes, so that nothing is encoded anew."""
    if isinstance(table, dict):
        raise UsageError(f"This dataset has the splits {', '.join(table)}; give the folder of one of them.")
    for name, feature in (table.features or {}).items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    yield from table


def _fetched(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The same rows with the pictures that lie in files of the hub; paths to anywhere else stay unread."""
    fsspec = importlib.import_module("fsspec")
    for row in rows:
        filled = dict(row)
        for name, value in row.items():
            if isinstance(value, Mapping) and value.get("bytes") is None and "hf://" in str(value.get("path")):
                with fsspec.open(value["path"], "rb") as file:
                    filled[name] = {**value, "bytes": file.read()}
        yield filled


def _files(rows: Iterable[Mapping[str, Any]], order: Order) -> Iterator[File | Problem]:
    """Rows -> pictures called by their number, with the other columns as metadata."""
    image_column = text_column = ""
    for number, row in enumerate(rows):
        if not number:
            image_column = _image_column(row, order.image_column)
            text_column = _text_column(row, order.text_column)
            if not text_column:
                yield _no_captions(row, image_column)
        data, original = _picture(row.get(image_column))
        ending = next((end for at, start, end in MAGIC if data[at : at + len(start)] == start), None)
        if ending is None:
            yield Problem(
                f"row {number}",
                f"has no picture in {image_column!r} ({f'it starts with {data[:12]!r}' if data else 'it is empty'})",
                "rows hold the bytes of a picture file, or name one",
                "mend the table, or name another column with --image-column",
            )
            continue
        columns = {name: plain(value) for name, value in row.items() if name != image_column}
        if text_column in columns and text_column not in (*TEXT_COLUMNS, TAGS):
            columns["text"] = columns.pop(text_column)
        if original:
            columns.setdefault("original_name", PurePosixPath(original).name)
        yield File(f"{number:07d}{ending}", data, {name: v for name, v in columns.items() if name != "file_name"})


def _image_column(row: Mapping[str, Any], wanted: str | None) -> str:
    if wanted is not None and wanted in row:
        return wanted
    found = [name for name in (*IMAGE_COLUMNS, *row) if name in row and _picture(row[name])[0]]
    found = found or [name for name in IMAGE_COLUMNS if name in row]
    if wanted is not None or not found:
        raise UsageError(
            f"No column {wanted or 'with pictures'!r}; there are {', '.join(map(shown, row))}. "
            "Name the one with the pictures: --image-column NAME."
        )
    return found[0]


def _text_column(row: Mapping[str, Any], wanted: str | None) -> str:
    if wanted is not None and wanted not in row:
        raise UsageError(
            f"No column {wanted!r}; there are {', '.join(map(shown, row))}. Name the captions': --text-column NAME."
        )
    return wanted or next((name for name in (*TEXT_COLUMNS, TAGS) if name in row), "")


def _no_captions(row: Mapping[str, Any], image_column: str) -> Problem:
    rest = ", ".join(repr(name) for name in row if name != image_column)
    return Problem(
        "",
        "no column is known to hold captions",
        f"the columns beside the pictures are {rest or 'none'}",
        "name it with --text-column, or give one sentence for all: scan with --captions template --template '...'",
        "warning",
    )


def _picture(value: object) -> tuple[bytes, str]:
    """The bytes of a picture and the name it had, from what tables hold: bytes, or {bytes, path}."""
    if isinstance(value, bytes):
        return value, ""
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        return data if isinstance(data, bytes) else b"", path if isinstance(path, str) else ""
    return b"", ""
