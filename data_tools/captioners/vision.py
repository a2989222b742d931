"""Captioners that look at the pictures: which models there are, what they are asked, and the pictures for them.

A captioner of this kind is a `Captioner` like any other: it is called with a listing (of one batch of pictures) and
answers for it. This module is free of torch; the model's own module is imported when a captioner is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from PIL import Image

from data_tools.captioners.base import Answer, Caption
from data_tools.errors import Problem, RefusedError, UsageError
from data_tools.folder import Listing
from data_tools.images import read_picture
from data_tools.pool import death, in_workers
from data_tools.quality import reduced
from data_tools.text import split_captions

SIDE = 1024
"""Pictures come to the model with at most this many pixels on the longer side; it resizes further as it was trained."""
Say = Callable[[Sequence[Image.Image]], Sequence[Sequence[str]]]
"""Captions of each picture, in order. What stands beside a picture in its batch changes nothing."""


@dataclass(frozen=True)
class VisionModel:
    """A kind of model, where its weights come from, and what it is asked if the user says nothing."""

    module: str
    """Of this package; its `load(name, model, asking)` returns a `Say`."""
    place: str
    """A hub id."""
    types: tuple[str, ...]
    """`model_type` in config.json; empty where there is none."""
    prompts: tuple[str, ...]
    batch: int
    """Pictures at once, for a GPU of 8 GB."""
    about: str


VISION: Mapping[str, VisionModel] = MappingProxyType(
    {
        "blip": VisionModel(
            "speakers", "Salesforce/blip-image-captioning-large", ("blip",), ("",), 16, "one short sentence, 2 GB"
        ),
        "blip2": VisionModel(
            "speakers", "Salesforce/blip2-opt-2.7b", ("blip-2",), ("",), 4, "one sentence, answers questions, 15 GB"
        ),
        "florence2": VisionModel(
            "speakers", "florence-community/Florence-2-base", ("florence2",), ("<DETAILED_CAPTION>",), 8,
            "short to long descriptions, 1 GB",
        ),
        "smolvlm": VisionModel(
            "speakers", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", ("smolvlm", "idefics3"),
            ("Describe this picture in one sentence.",), 4, "follows a prompt, 2 GB",
        ),
        "qwen_vl": VisionModel(
            "speakers", "Qwen/Qwen2.5-VL-3B-Instruct", ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
            ("Describe this picture in one sentence.",), 4, "follows a prompt best, 8 GB",
        ),
        "wd_tagger": VisionModel(
            "tagger", "SmilingWolf/wd-vit-tagger-v3", (), ("",), 8, "booru tags for drawings, 0.4 GB"
        ),
    }
)  # fmt: skip
"""By name. Only classes of the installed transformers: code that comes with a model is never run."""


@dataclass(frozen=True)
class Asking:
    """How a model is asked; None means the model's own value in `VISION`."""

    model: str | None = None
    """A local folder or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    prompts: tuple[str, ...] = ()
    """What the model is told or asked; each one gives captions of its own."""
    count: int = 1
    """Captions for each prompt: the best ones of a beam search as wide."""
    length: int = 120
    """A caption ends after so many new tokens."""
    batch: int | None = None
    device: str | None = None
    """Such as cuda, cuda:1, mps, cpu; the GPU if there is one."""
    general: float = 0.35
    character: float = 0.85
    """Probabilities from which a tag counts. Source: the model card's and kohya's usual values."""

    def place(self, name: str) -> str:
        """Where the weights of the model called `name` come from."""
        return self.model or VISION[name].place


@dataclass(frozen=True)
class Viewer:
    """Captions by looking: decode the pictures of a listing, show them to the model, check what it says."""

    name: str
    say: Say
    batch: int

    def __call__(self, listing: Listing, template: str | None) -> Answer:
        """Caption `listing.pictures` as one batch; `template` is not used."""
        answer, pictures = Answer(), []

        def look(name: str) -> Image.Image | Problem:
            try:
                return reduced(read_picture(listing.root / name), SIDE)
            except RefusedError as refusal:
                return refusal.problem(name)

        for name, seen in zip(listing.pictures, in_workers(look, listing.pictures, None, death), strict=True):
            if isinstance(seen, Problem):
                answer.fail(name, seen)
            else:
                pictures.append((name, seen))
        said = self.say([picture for _, picture in pictures]) if pictures else []
        for (name, _), texts in zip(pictures, said, strict=True):
            try:
                lines = [line for text in texts for line in split_captions(" ".join(text.split())) if line]
            except RefusedError as refusal:
                answer.fail(name, refusal.problem(name))
                continue
            if lines:
                answer.captions[name] = Caption(tuple(dict.fromkeys(lines)), self.name)
            else:
                answer.fail(name, _silent(name, self.name))
        return answer


def _silent(name: str, captioner: str) -> Problem:
    return Problem(
        name,
        f"got no words from {captioner}",
        "the model ended at once, or no tag was likely enough",
        "write its caption by hand, or ask with another --prompt, threshold or model",
    )


def open_viewer(name: str, asking: Asking) -> Viewer:
    """Load the model called `name` in `VISION`.

    Raises:
        UsageError: no weights there, of another model, not safe to open, or options that do not fit.
    """
    known = VISION[name]
    _check_folder(name, asking)
    module = importlib.import_module(f"data_tools.captioners.{known.module}")
    return Viewer(name, module.load(name, asking), asking.batch or known.batch)


def _check_folder(name: str, asking: Asking) -> None:
    """Refuse a path without a folder, and a revision that a folder cannot have."""
    place = asking.place(name)
    if Path(place).is_dir():
        if asking.revision is not None:
            raise UsageError(f"--revision {asking.revision} is for hub ids, but --model {place} is a folder.")
    elif place.count("/") != 1 or place.startswith((".", "/", "~")):
        known = VISION[name].place
        raise UsageError(f"--model {place} is neither a folder that is there nor a hub id such as {known}.")


def how_to_fetch(name: str, asking: Asking) -> str:
    """What to do on a machine without a network."""
    place = VISION[name].place if asking.model is None or Path(asking.model).is_dir() else asking.model
    revision = f" --revision {asking.revision}" if asking.revision else ""
    folder = place.rpartition("/")[2]
    return (
        f"where there is a network, run `hf download {place}{revision} --local-dir {folder}`, copy the folder here "
        f"and give it with --model {folder}"
    )
