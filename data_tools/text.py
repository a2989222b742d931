"""Bytes of a caption file -> captions, or words that say exactly where it goes wrong."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from data_tools.errors import RefusedError
from data_tools.files import open_regular

MAX_ROWS_BYTES = 4 * 2**30
"""Above this a metadata file is refused; a million rows are about 500 MB. They are read one by one."""
MAX_TEXT_BYTES = 256 * 2**20
"""Above this other files that are read at once are refused."""
MAX_CAPTION_BYTES = 2**20
"""Above this a caption file is refused: it is not a caption."""
# The end-of-text words of the CLIP tokenizers: inside a caption they become the real token and cut it short.
CONTROL_WORDS = ("<|startoftext|>", "<|endoftext|>")
# keep: the 4-byte marks first, because the UTF-32 mark begins with the UTF-16 one.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# keep: not str.splitlines, which also splits at form feeds and at separators that JSON allows in a string.
LINE_END = re.compile(r"\r\n|\r|\n")
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")
RESAVE = "save it as UTF-8"


def decode_text(data: bytes) -> str:
    """UTF-8 text, or UTF-16/32 when a byte order mark says so; the mark is stripped.

    Raises:
        RefusedError: bytes that are no such text, or a NUL character; line and byte (from 1) are told.
    """
    mark, encoding = _mark(data)
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        before = data[len(mark) :][: error.start].decode(encoding, errors="replace")
        byte = len(mark) + error.start
        raise RefusedError(
            f"{_place(before, byte)}: byte 0x{data[byte]:02x} is not {encoding.upper()}",
            "the caption would be guessed (Latin-1 and Windows-1252 look like this)",
            RESAVE,
        ) from error
    if "\0" in text:
        before = text[: text.index("\0")]
        byte = len(mark) + len(before.encode(encoding))
        raise RefusedError(
            f"{_place(before, byte)}: a NUL character",
            "this is not text, or UTF-16 without its byte order mark",
            RESAVE,
        )
    return text


def _mark(data: bytes) -> tuple[bytes, str]:
    """The byte order mark at the beginning, and the encoding it tells."""
    return next(((mark, name) for mark, name in MARKS if data.startswith(mark)), (b"", "utf-8"))


@contextmanager
def open_text(path: Path, newline: str) -> Iterator[TextIO]:
    """The lines of a long text, which is read through once to see that it is one; `newline` as for `open`.

    Raises:
        RefusedError: as `decode_text` and `read_regular`, before the first line.
    """
    with open_regular(path, MAX_ROWS_BYTES) as file:
        mark, encoding = _mark(file.read(4))
        file.seek(len(mark))
        decoder = codecs.getincrementaldecoder(encoding)()
        try:
            whole = not any("\0" in decoder.decode(block) for block in iter(lambda: file.read(2**16), b""))
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            whole = False
        if not whole:
            file.seek(0)
            decode_text(file.read())
        file.seek(len(mark))
        yield TextIOWrapper(file, encoding, newline=newline)


def _place(before: str, byte: int) -> str:
    return f"line {len(LINE_END.split(before))}, byte {byte + 1}"


def split_captions(text: str) -> tuple[str, ...]:
    """One caption per line, trimmed; blank lines are skipped; a blank text is one empty caption.

    Raises:
        RefusedError: control characters or tokenizer control words in a caption.
    """
    captions = tuple(line.strip() for line in LINE_END.split(text) if line.strip())
    for number, caption in enumerate(captions, start=1):
        control = CONTROL.search(caption)
        if control is not None:
            raise RefusedError(
                f"caption line {number} holds the control character U+{ord(control[0]):04X}",
                "it is no text and can rewrite a terminal",
                "remove it",
            )
        word = next((word for word in CONTROL_WORDS if word in caption), None)
        if word is not None:
            raise RefusedError(
                f"caption line {number} holds {word}",
                "the tokenizer would take it as the real end of the text and ignore the rest",
                "remove it",
            )
    return captions or ("",)
