"""Contact sheets: rows of pictures under their prompts, for an eye that compares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

PAPER = "#fbfaf7"
INK = "#23262b"
QUIET = "#6d727b"
RULE = "#e4e1d9"
EMPTY = "#f0eee8"
ACCENT = "#c8553d"

MARGIN = 32
GAP = 12
LABEL_WIDTH = 148
TITLE_SIZE = 28
LABEL_SIZE = 18
NOTE_SIZE = 14
HEAD_SIZE = 15
SMALLEST_TILE = 176
"""Pictures are enlarged by a whole factor until they are at least this wide, in pixels."""
LARGEST_TILE = 384
"""Larger pictures are reduced to this side, in pixels."""


@dataclass(frozen=True)
class Row:
    """One line of a sheet.

    Attributes:
        label: stands to the left of the pictures, e.g. "base model" or "step 400".
        images: one per column; None leaves the place empty.
        note: a second, quieter line under the label, e.g. "subject fidelity 0.83".
        accent: draws a coloured mark beside the label, for the row that matters.
    """

    label: str
    images: Sequence[Image.Image | None]
    note: str = ""
    accent: bool = False


def seeds_label(seeds: Iterable[int]) -> str:
    """The label of a row whose pictures have these seeds."""
    shown = sorted(set(seeds))
    return f"seed{'s' if len(shown) > 1 else ''} {', '.join(map(str, shown))}"


@dataclass(frozen=True)
class _Layout:
    """Where pictures stand, in pixels."""

    left: int
    top: int
    tile: tuple[int, int]
    columns: int
    smooth: bool

    def corner(self, row: int, column: int) -> tuple[int, int]:
        return self.left + column * (self.tile[0] + GAP), self.top + row * (self.tile[1] + GAP)


def contact_sheet(
    rows: Sequence[Row],
    *,
    columns: Sequence[str],
    title: str = "",
    subtitle: str = "",
    scale: int | None = None,
    smooth: bool = True,
) -> Image.Image:
    """A labelled sheet in RGB.

    Args:
        rows: from top to bottom.
        columns: the heads, usually prompts; long ones are wrapped.
        title, subtitle: above everything; empty leaves them out.
        scale: whole factor by which pictures are enlarged; None enlarges small pictures until they are easily
            seen.
        smooth: enlarge smoothly; False keeps the pixels visible.
    """
    tile = _tile_size(rows, scale)
    left = MARGIN + (LABEL_WIDTH + GAP if any(row.label or row.note for row in rows) else 0)
    width = max(left + len(columns) * (tile[0] + GAP) - GAP + MARGIN, 2 * MARGIN + _longest(title, subtitle))
    heads = [_wrap(text, _font(HEAD_SIZE), tile[0]) for text in columns]
    head_height = max((len(lines) for lines in heads), default=0) * _line(HEAD_SIZE)
    title_height = (_line(TITLE_SIZE) if title else 0) + (_line(LABEL_SIZE) if subtitle else 0)
    top = MARGIN + title_height + (GAP + 6 if title_height else 0) + head_height + (GAP if head_height else 0)
    sheet = Image.new("RGB", (width, top + len(rows) * (tile[1] + GAP) - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    _draw_title(draw, title, subtitle, width)
    layout = _Layout(left, top, tile, len(columns), smooth)
    for number, lines in enumerate(heads):
        # Heads of different length stand on the pictures, not under the title.
        start = top - GAP + 2 - len(lines) * _line(HEAD_SIZE)
        _write(draw, (layout.corner(0, number)[0], start), lines, HEAD_SIZE, QUIET)
    for number, row in enumerate(rows):
        _draw_label(draw, row, layout.corner(number, 0)[1], tile[1])
        for column, picture in enumerate([*row.images, *[None] * len(columns)][: len(columns)]):
            _draw_tile(sheet, picture, layout.corner(number, column), layout)
    return sheet


def _draw_title(draw: ImageDraw.ImageDraw, title: str, subtitle: str, width: int) -> None:
    top = MARGIN - 4
    if title:
        _write(draw, (MARGIN, top), [title], TITLE_SIZE, INK)
        top += _line(TITLE_SIZE)
    if subtitle:
        _write(draw, (MARGIN, top), [subtitle], LABEL_SIZE, QUIET)
        top += _line(LABEL_SIZE)
    if title or subtitle:
        draw.line([(MARGIN, top + 6), (width - MARGIN, top + 6)], fill=RULE, width=1)


def _draw_label(draw: ImageDraw.ImageDraw, row: Row, top: int, tile_height: int) -> None:
    """Label and note to the left of the pictures, centred on them."""
    label = _wrap(row.label, _font(LABEL_SIZE), LABEL_WIDTH)
    note = _wrap(row.note, _font(NOTE_SIZE), LABEL_WIDTH)
    height = len(label) * _line(LABEL_SIZE) + len(note) * _line(NOTE_SIZE)
    top += max(0, (tile_height - height) // 2)
    if row.accent and height:
        draw.rounded_rectangle((MARGIN - 12, top + 2, MARGIN - 8, top + height), radius=2, fill=ACCENT)
    _write(draw, (MARGIN, top), label, LABEL_SIZE, INK)
    _write(draw, (MARGIN, top + len(label) * _line(LABEL_SIZE)), note, NOTE_SIZE, QUIET)


def _draw_tile(
    sheet: Image.Image, picture: Image.Image | None, corner: tuple[int, int], layout: _Layout
) -> None:
    """One picture, as large as fits and in the middle of its place; an empty place is a quiet square."""
    draw = ImageDraw.Draw(sheet)
    (x, y), (width, height) = corner, layout.tile
    if picture is None:
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=EMPTY)
        return
    factor = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    enlarge = Image.Resampling.BICUBIC if layout.smooth else Image.Resampling.NEAREST
    fitted = picture.convert("RGB").resize(size, enlarge if factor > 1 else Image.Resampling.LANCZOS)
    offset = (x + (width - size[0]) // 2, y + (height - size[1]) // 2)
    sheet.paste(fitted, offset)
    draw.rectangle((*offset, offset[0] + size[0] - 1, offset[1] + size[1] - 1), outline=RULE, width=1)


def _tile_size(rows: Sequence[Row], scale: int | None) -> tuple[int, int]:
    """Pixels (width, height) that hold the largest picture after enlarging or reducing."""
    pictures = [picture for row in rows for picture in row.images if picture is not None]
    width = max((picture.width for picture in pictures), default=SMALLEST_TILE)
    height = max((picture.height for picture in pictures), default=SMALLEST_TILE)
    factor: float = scale if scale is not None else -(-SMALLEST_TILE // width)
    if scale is None and factor * max(width, height) > LARGEST_TILE:
        factor = LARGEST_TILE / max(width, height)
    return max(1, round(width * factor)), max(1, round(height * factor))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break text into lines of at most `width` pixels, inside a word only if it alone is wider."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines


def _write(
    draw: ImageDraw.ImageDraw, corner: tuple[float, float], lines: Sequence[str], size: int, colour: str
) -> None:
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * _line(size)), line, font=_font(size), fill=colour)


def _longest(title: str, subtitle: str) -> int:
    return int(max(_font(TITLE_SIZE).getlength(title), _font(LABEL_SIZE).getlength(subtitle))) + 1


def _line(size: int) -> int:
    return round(size * 1.32)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
