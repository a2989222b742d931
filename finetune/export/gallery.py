"""What a run has to show on its model card: sample pictures with their prompts, and its data in a few rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data_tools.errors import counted
from finetune.export.sidecars import write_picture
from finetune.prompt_lines import parse_prompt
from finetune.sampling.grid import Row, contact_sheet
from finetune.storage import read_json

FOLDER = "images"
"""Where pictures lie beside a model card; the hub's own template calls it so."""
BEFORE_AFTER = f"{FOLDER}/before-after.png"
MOST_PICTURES = 12
"""In the gallery; those that did not fit are still in the run folder."""
MOST_COLUMNS = 4
"""Of the comparison with the base; a card is some 900 pixels wide."""
MOST_SIZES = 4


@dataclass(frozen=True)
class Sample:
    """One picture after training, and the base model's answer to the same prompt and seed."""

    prompt: str
    after: Path
    before: Path


def samples_of(run_folder: Path) -> list[Sample]:
    """The run's newest sample pictures: the first seed of every prompt, then the second, ...; none without training."""
    told = sorted((run_folder / "samples").glob("step-*/questions.json"))
    if len(told) < 2:
        return []
    first, newest = told[0].parent, told[-1].parent
    asked = read_json(told[-1])
    found = []
    for offset in range(asked["per_prompt"]):
        for number, line in enumerate(asked["prompts"]):
            prompt, own = parse_prompt(line)
            name = f"{number:03d}-{own.get('seed', 0) + offset}.png"
            found.append(Sample(prompt, newest / name, first / name))
    return [sample for sample in found if sample.after.is_file()]


def write_gallery(samples: Sequence[Sample], folder: Path) -> list[tuple[str, str]]:
    """Copy pictures into `images/` of a folder, without what their files say besides pixels; (prompt, file) of each.

    Beside them lies `images/before-after.png`: the base model's answers over the adapter's.
    """
    chosen = list(samples[:MOST_PICTURES])
    if not chosen:
        return []
    (folder / FOLDER).mkdir(exist_ok=True)
    written = []
    for sample in chosen:
        written.append((sample.prompt, f"{FOLDER}/{sample.after.name}"))
        write_picture(_opened(sample.after), folder / written[-1][1])
    columns = chosen[:MOST_COLUMNS]
    rows = [
        Row("base model", [_opened(sample.before) if sample.before.is_file() else None for sample in columns]),
        Row("with the adapter", [_opened(sample.after) for sample in columns], accent=True),
    ]
    write_picture(contact_sheet(rows, columns=[sample.prompt for sample in columns]), folder / BEFORE_AFTER)
    return written


def data_rows(run_folder: Path, outside: float) -> list[tuple[str, str]]:
    """What the run was trained on, in numbers: no name of a file and no caption.

    Args:
        outside: what counts of the places that a mask leaves out, 0 to 1.
    """
    known: dict[str, Sequence[Any]] = read_json(run_folder / "dataset.json")
    own = [facts for key, facts in known.items() if key.startswith("instance/")]
    others = len(known) - len(own)
    sizes = Counter((bucket[1], bucket[0]) for _, _, bucket, *_ in own)
    shown = [f"{width} x {height} ({count})" for (width, height), count in sizes.most_common(MOST_SIZES)]
    shown += [f"{len(sizes) - MOST_SIZES} more"] if len(sizes) > MOST_SIZES else []
    masks = sum(facts[-1] is not None for facts in own)
    rows = [
        ("pictures", f"{len(own)} of the subject" + (f", {others} of its class" if others else "")),
        ("resolution in pixels", ", ".join(shown)),
        ("captions", _captions([caption for _, captions, *_ in own for caption in captions])),
        ("masks", f"{masks} of {counted(len(own), 'picture')}; weight outside {outside:g}" if masks else "none"),
    ]
    return rows if own else []


def _captions(captions: Sequence[str]) -> str:
    different = set(captions)
    if not any(different):
        return "empty"
    lengths = sorted(len(caption.split()) for caption in different)
    words = counted(lengths[0], "word") if lengths[0] == lengths[-1] else f"{lengths[0]} to {lengths[-1]} words"
    return f"one for all of them, {words}" if len(different) == 1 else f"{len(different)} different, {words}"


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
