"""One sentence for all pictures, with a few blanks to fill."""

from __future__ import annotations

from pathlib import PurePosixPath
from string import Formatter

from data_tools.captioners.base import Answer, Caption
from data_tools.captioners.kohya import folder_name
from data_tools.errors import RefusedError, UsageError
from data_tools.folder import Listing
from data_tools.text import split_captions

BLANKS = {
    "stem": "the file's name without its ending",
    "folder": "the name of its folder, without kohya's number; of the dataset folder for pictures at the top",
    "number": "1, 2, 3, ... in the order of the scan",
}
"""What may stand in braces; `{{` and `}}` are plain braces."""


def template(listing: Listing, template: str | None) -> Answer:
    """Fill `template` for each picture: "a photo of sks {folder}"; several lines are several captions."""
    lines = check_template(template or "")
    answer = Answer()
    for number, name in enumerate(listing.pictures, start=1):
        path = PurePosixPath(name)
        folder = folder_name(path.parent.name) if path.parent.name else listing.root.name
        # keep: filled line by line, so that a line break in a file's name cannot become a second caption.
        filled = (line.format(stem=path.stem, folder=folder, number=number) for line in lines)
        try:
            captions = tuple(split_captions(" ".join(line.split()))[0] for line in filled)
            answer.captions[name] = Caption(captions, "template")
        except RefusedError as refusal:
            answer.fail(name, refusal.problem(name))
    return answer


def check_template(text: str) -> tuple[str, ...]:
    """The lines of a template that can be filled.

    Raises:
        UsageError: no words, unbalanced braces, or a blank that is not in `BLANKS`.
    """
    known = ", ".join(f"{{{blank}}}" for blank in BLANKS)
    try:
        parts = list(Formatter().parse(text))
        lines = split_captions(text)
    except ValueError as error:
        raise UsageError(
            f"The template {text!r} cannot be read ({error}); write {{{{ and }}}} for plain braces."
        ) from error
    except RefusedError as refusal:
        raise UsageError(f"The template {text!r} cannot be used: {refusal}.") from refusal
    if lines == ("",):
        raise UsageError('The template is empty; give one such as --template "a photo of sks dog".')
    for _, blank, spec, conversion in parts:
        # keep: plain names only, because a format string such as {stem.__class__} reads attributes.
        if blank is not None and (blank not in BLANKS or spec or conversion):
            raise UsageError(f"The template {text!r} has a blank {{{blank}}} that is not known; known are {known}.")
    return lines
