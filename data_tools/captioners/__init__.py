"""Where captions come from: one function per source, in one table."""

from __future__ import annotations

from collections.abc import Iterable

from data_tools.captioners.base import Answer, Caption, Captioner
from data_tools.captioners.filename import filename
from data_tools.captioners.kohya import kohya
from data_tools.captioners.metadata import metadata
from data_tools.captioners.sidecar import sidecar
from data_tools.captioners.template import check_template, template
from data_tools.errors import Problem, UsageError, counted
from data_tools.folder import Listing
from data_tools.names import stem
from data_tools.shelves import Shelf

__all__ = ["AUTO", "CAPTIONERS", "Answer", "Caption", "Captioner", "caption_folder"]

CAPTIONERS: dict[str, Captioner] = {
    "sidecar": sidecar,
    "metadata": metadata,
    "kohya": kohya,
    "template": template,
    "filename": filename,
}
AUTO = "auto"
"""Metadata when the folder has it; else, per picture, the first of sidecar, kohya, template that answers."""


def caption_folder(listing: Listing, captions: str = AUTO, template_text: str | None = None) -> Answer:
    """Caption all pictures of a folder; each one without a caption is named with what to do.

    Args:
        listing: the folder.
        captions: "auto" or a name in `CAPTIONERS`.
        template_text: a sentence with blanks, for "template" and "auto".

    Raises:
        UsageError: an unknown name, or a template that is missing, unused or cannot be filled.
    """
    check_choice(captions, template_text)
    if captions != AUTO:
        answer = CAPTIONERS[captions](listing, template_text)
        missing = Shelf(answer.missing(listing.pictures))
    elif listing.metadata:
        answer, missing = metadata(listing, template_text), Shelf()
        _compare_sidecars(listing, answer)
    else:
        answer, missing = _first_that_answers(listing, template_text)
    _name_the_uncaptioned(missing, answer, captions)
    _name_unused_sidecars(listing, answer)
    return answer


def check_choice(captions: str, template_text: str | None) -> None:
    """Refuse a source that is not known and a template that could not be followed."""
    if captions != AUTO and captions not in CAPTIONERS:
        raise UsageError(f"captions={captions!r} is not known; choose one of {', '.join([AUTO, *CAPTIONERS])}.")
    if template_text is not None:
        check_template(template_text)
        if captions not in (AUTO, "template"):
            raise UsageError(f"A template is given, but captions={captions!r} never uses it; leave out one of the two.")
    elif captions == "template":
        raise UsageError('captions="template" needs a template, such as --template "a photo of sks dog".')


def _first_that_answers(listing: Listing, template_text: str | None) -> tuple[Answer, Shelf[str]]:
    """The answer, and the pictures of which it says nothing."""
    answer = sidecar(listing, None)
    missing = Shelf(answer.missing(listing.pictures))
    for source in (kohya, template):
        if missing and (source is not template or template_text is not None):
            # keep: a template counts all pictures.
            rest = Listing(listing.root, missing if source is not template else listing.pictures, listing.sidecars)
            answer.extend(source(rest, template_text), missing)
            missing = Shelf(answer.missing(missing))
    return answer, missing


def _compare_sidecars(listing: Listing, answer: Answer) -> None:
    """Metadata wins over sidecars; where they say different things, somebody edited one of them."""
    beside = sidecar(listing, None)
    answer.orphans = beside.orphans
    for name, found in beside.captions.each():
        known = answer.captions.get(name)
        if known is not None and known.captions != found.captions:
            answer.problems.append(
                Problem(
                    name,
                    f"has another caption in its text file than in {listing.metadata[0]}",
                    "the metadata is used",
                    "take the text files with --captions sidecar --write, or remove them",
                    "warning",
                )
            )


def _name_the_uncaptioned(missing: Iterable[str], answer: Answer, captions: str) -> None:
    for name in missing:
        answer.fail(
            name,
            Problem(
                name,
                "has no caption",
                f"nothing was found for captions={captions!r}",
                "write a text file of the same name beside it, put it in a folder named N_name, "
                'give one caption for all (scan: --template "a photo of ..."; training: '
                "data.caption_template), or take file names (scan: --captions filename; training: "
                "data.captions=filename)",
            ),
        )


def _name_unused_sidecars(listing: Listing, answer: Answer) -> None:
    unused, first = 0, ""
    for name in listing.sidecars if answer.orphans is None else answer.orphans:
        if listing.by_stem(stem(name)):
            unused, first = unused + 1, first or name
        else:
            answer.problems.append(
                Problem(
                    name,
                    "is a text file without a picture",
                    "only exactly the same stem counts",
                    "rename it if it is the caption of a picture",
                    "warning",
                )
            )
    if unused:
        answer.problems.append(
            Problem(
                "",
                f"{counted(unused, 'caption file is', 'caption files are')} not read, such as {first}",
                "captions are taken from elsewhere",
                "to read them: --captions sidecar (in training data.captions=sidecar)",
                "note",
            )
        )
