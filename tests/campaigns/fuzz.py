"""Feed the data tools damaged and random input for a while; every answer must be a result or words for the user.

    python -m tests.campaigns.fuzz --minutes 5 [--seed 0]

Pictures: files of every format with bytes flipped, cut, repeated or joined. Texts: caption files, JSON and CSV rows
of random and hostile characters. Folders: whole scans over such files. Archives: damaged zip and tar files, whose
import may only write into its own folder. Counted are inputs, refusals and results; anything else is printed with its
bytes and ends the campaign with exit code 1, as does a single input that takes more than `SLOW` seconds.
"""

from __future__ import annotations

import argparse
import io
import random
import shutil
import string
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from data_tools.errors import DataToolsError, RefusedError
from data_tools.images import decode
from data_tools.importing import import_pictures
from data_tools.rows import Row, read_rows
from data_tools.scan import scan
from data_tools.sources import Order
from data_tools.text import decode_text, split_captions

SLOW = 5.0
"""Seconds of processor time for one input."""
FORMATS = {
    "JPEG": {}, "PNG": {}, "WEBP": {}, "GIF": {"save_all": True}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"},
    "AVIF": {}, "HEIF": {}, "MPO": {},
}  # fmt: skip
ODD = [
    "\ufeff", "\u202e", "\x00", "\x1b[2J", "<|endoftext|>", "\U0001f600", "e\u0301", "\r", "\n", "\t", '"', ",",
    "{", "}", "[", "]", "\\", ":", "null", "1e999", "../", "http://x", "\x85", "\u2028", "file_name", "text",
]  # fmt: skip


def seeds(chance: random.Random) -> dict[str, bytes]:
    """One small picture of every format that this Pillow can write."""
    image = Image.frombytes("RGB", (40, 24), chance.randbytes(40 * 24 * 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {}
    for name, options in FORMATS.items():
        buffer = io.BytesIO()
        try:
            image.save(buffer, name, exif=exif, **options)
        except (KeyError, OSError):
            continue
        found[name] = buffer.getvalue()
    for mode in ("P", "LA", "I;16", "CMYK", "1"):
        buffer = io.BytesIO()
        image.convert("L").convert("I;16").save(buffer, "PNG") if mode == "I;16" else image.convert(
            "L" if mode == "LA" else mode
        ).convert(mode).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
        found[mode] = buffer.getvalue()
    return found


def damaged(chance: random.Random, data: bytes, other: bytes) -> bytes:
    """`data` after one to six accidents."""
    raw = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(raw)) if raw else 0
        kind = chance.randrange(7)
        if kind < 3 and raw:
            raw[at] = chance.choice((0, 0xFF, 0x7F, chance.randrange(256)))
        elif kind == 3:
            del raw[at:]
        elif kind == 4:
            raw[at:at] = raw[at : at + chance.randint(1, 64)]
        elif kind == 5:
            raw[at : at + chance.randint(1, 16)] = chance.randbytes(chance.randint(0, 16))
        else:
            raw[at:] = other[chance.randrange(len(other)) :]
    return bytes(raw)


def words(chance: random.Random) -> str:
    """Text of letters and traps."""
    parts = (chance.choice(ODD) if chance.random() < 0.3 else chance.choice(string.ascii_letters) for _ in range(40))
    return "".join(parts)[: chance.randint(0, 60)]


def picture(chance: random.Random, files: dict[str, bytes], _: Path) -> bool:
    """A damaged picture decodes to RGB within the limits, or is refused."""
    data = damaged(chance, *(files[name] for name in chance.choices(list(files), k=2)))
    try:
        image, _notes = decode(data)
    except RefusedError:
        return False
    assert image.mode == "RGB" and image.width * image.height <= 64_000_000
    return True


def caption(chance: random.Random, _files: dict[str, bytes], _: Path) -> bool:
    """Random bytes are captions without control characters, or refused."""
    encoding = chance.choice(("utf-8", "utf-8", "utf-16", "utf-32", "latin-1"))
    data = words(chance).encode(encoding, errors="replace") + chance.randbytes(chance.choice((0, 0, 0, 3)))
    try:
        captions = split_captions(decode_text(data))
    except RefusedError:
        return False
    assert captions and not any(char < " " and char != "\t" for line in captions for char in line)
    return True


def rows(chance: random.Random, _files: dict[str, bytes], folder: Path) -> bool:
    """A metadata file of random rows gives rows and problems."""
    name = chance.choice(("metadata.jsonl", "metadata.csv", "metadata.parquet"))
    lines = (f'{{"file_name": "{words(chance)}", "text": {chance.choice(ODD)!r}, "repeats": {words(chance)}}}'
             for _ in range(5))  # fmt: skip
    (folder / name).write_bytes("\n".join([words(chance), *lines]).encode("utf-8", errors="replace"))
    return any(isinstance(row, Row) for row in read_rows(folder, name))


def whole(chance: random.Random, files: dict[str, bytes], folder: Path) -> bool:
    """A folder of damaged files and random texts scans to records and problems that name every file."""
    for number in range(4):
        kind = chance.choice(list(files))
        data = files[kind] if chance.random() < 0.5 else damaged(chance, files[kind], files["PNG"])
        (folder / f"{number}.png").write_bytes(data)
        text = words(chance).encode("utf-8", errors="replace")
        (folder / f"{number}{chance.choice(('.txt', '.json', '.caption'))}").write_bytes(text)
    if chance.random() < 0.3:
        rows(chance, files, folder)
    try:
        result = scan(folder, workers=1)
    except DataToolsError:
        return False
    told = {problem.file_name.split(" (")[0] for problem in result.problems} | {r.file_name for r in result.records}
    # keep: a caption file that cannot be read is told in place of its picture.
    named = {name.rsplit(".", 1)[0] for name in told}
    assert {str(number) for number in range(4)} <= named, f"left out in silence: {told}"
    return bool(result.records)


def archive(chance: random.Random, files: dict[str, bytes], folder: Path) -> bool:
    """A damaged archive fills its own folder only."""
    buffer = io.BytesIO()
    name = chance.choice(("a.png", "../a.png", "/a.png", "b/" * 20 + "a.png", "\udcff.png", words(chance) or "x"))
    if chance.random() < 0.5:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
            # keep: the writer itself fails on a name that begins with a null byte.
            name = name.replace("\0", "") or "x"
            packed.writestr(name.encode("utf-8", "replace").decode(), files["PNG"])
        ending = "zip"
    else:
        with tarfile.open(fileobj=buffer, mode=chance.choice(("w", "w:gz"))) as packed_tar:
            info = tarfile.TarInfo(name)
            info.size = len(files["PNG"])
            info.type = chance.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.REGTYPE, tarfile.DIRTYPE))
            packed_tar.addfile(info, io.BytesIO(files["PNG"]))
        ending = "tar"
    data = buffer.getvalue()
    place = folder / f"x.{ending}"
    place.write_bytes(damaged(chance, data, files["PNG"]) if chance.random() < 0.7 else data)
    try:
        done = import_pictures(Order(str(place)), folder / "new" / "deep")
    except DataToolsError:
        done = None
    outside = [path for path in folder.rglob("*") if path.is_file() and folder / "new" / "deep" not in path.parents]
    assert outside == [place], f"written outside: {outside}"
    return done is not None and done.new > 0


KINDS: dict[str, tuple[Callable[[random.Random, dict[str, bytes], Path], bool], int]] = {
    "pictures": (picture, 60),
    "captions": (caption, 60),
    "metadata files": (rows, 10),
    "folders": (whole, 3),
    "archives": (archive, 10),
}
"""What is tried, and how often in a round."""


def run(seed: int, until: Callable[[], bool]) -> tuple[Counter[str], list[str]]:
    """Rounds until `until()`; counts per kind and outcome, and what went wrong."""
    chance = random.Random(seed)
    files = seeds(chance)
    counts: Counter[str] = Counter()
    failures: list[str] = []
    base = Path(tempfile.mkdtemp())
    try:
        while not until():
            for name, (attempt, times) in KINDS.items():
                for _ in range(times):
                    _one(name, attempt, (chance, files, base / "f"), counts, failures)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return counts, failures


def _one(name, attempt, given, counts: Counter[str], failures: list[str]) -> None:  # type: ignore[no-untyped-def]
    chance, _, folder = given
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    state, began = chance.getstate(), time.process_time()
    try:
        counts[f"{name}: {'used' if attempt(*given) else 'refused'}"] += 1
    except Exception as error:
        counts[f"{name}: failed"] += 1
        failures.append(f"{name}: {type(error).__name__}: {error} (state {hash(str(state)) & 0xFFFFFFFF:08x})")
    spent = time.process_time() - began
    if spent > SLOW:
        failures.append(f"{name}: one input took {spent:.1f} s")


def main() -> None:
    """Run for a while and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    counts, failures = run(arguments.seed, lambda: time.monotonic() > end)
    for name, count in sorted(counts.items()):
        print(f"{name:32} {count:9,}")
    print(f"{'all':32} {sum(counts.values()):9,}; failures: {len(failures)}")
    for line in failures[:20]:
        print("  " + ascii(line))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
