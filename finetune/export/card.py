"""The model card: a README.md that the hub, a colleague and a search engine understand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune import storage
from finetune.export.job import ExportError
from finetune.export.metadata import private_parts, public_name

TAGS = ("lora", "diffusers", "text-to-image", "stable-diffusion", "template:sd-lora")


@dataclass(frozen=True)
class Card:
    """What the card says.

    Attributes:
        title: the heading.
        base: what the base model is called; a hub id becomes a link.
        description: a paragraph below the heading.
        trigger_words: what calls the subject; the first becomes the hub's instance prompt.
        license: an SPDX id or a hub licence name; empty leaves it open.
        author: who made it; empty leaves it out.
        pipeline: diffusers class that loads the base.
        repaints: whether that pipeline wants a picture and a mask beside the prompt.
        embeddings: names of the files of learned words, in the folder `embeddings`.
        kohya_file: name of the file for A1111 and ComfyUI; empty if there is none.
        diffusers_file: name of the file for diffusers; empty if there is none.
        figures: (what, value) rows of the results table, e.g. ("subject fidelity", "0.83").
        training: (what, value) rows of the training table.
        gallery: (prompt, picture file inside the folder) for the hub's gallery.
        sheet: a contact sheet inside the folder, shown under the heading.
        notes: further paragraphs in Markdown.
    """

    title: str
    base: str
    description: str = ""
    trigger_words: tuple[str, ...] = ()
    license: str = ""
    author: str = ""
    pipeline: str = "StableDiffusionPipeline"
    repaints: bool = False
    embeddings: tuple[str, ...] = ()
    kohya_file: str = ""
    diffusers_file: str = "pytorch_lora_weights.safetensors"
    figures: Sequence[tuple[str, str]] = ()
    training: Sequence[tuple[str, str]] = ()
    gallery: Sequence[tuple[str, str]] = ()
    sheet: str = ""
    tags: Sequence[str] = ()
    notes: Sequence[str] = field(default_factory=tuple)


def write_card(folder: Path, card: Card) -> Path:
    """Write `README.md` into the folder.

    Raises:
        ExportError: if the card would hold an absolute path, a token or the home folder.
    """
    text = render(card)
    if problems := [f"README.md would hold {part}; take it out." for part in private_parts(text)]:
        raise ExportError("The model card would give away something private.", problems)
    path = folder / "README.md"
    storage.write_text(path, text)
    return path


def render(card: Card) -> str:
    """The whole card as Markdown with the hub's YAML header."""
    parts = [_front_matter(card), f"# {card.title}"]
    if card.description:
        parts.append(card.description)
    if card.sheet:
        parts.append(f"![What the adapter changes]({card.sheet})")
    if card.trigger_words:
        words = ", ".join(f"`{word}`" for word in card.trigger_words)
        parts.append(f"Write {words} in the prompt.")
    if card.figures:
        parts += ["## Results", _table(("measure", "value"), card.figures)]
    parts += ["## Use", *_usage(card)]
    if card.training:
        parts += ["## Training", _table(("setting", "value"), card.training)]
    return "\n\n".join([*parts, *card.notes]) + "\n"


def _front_matter(card: Card) -> str:
    entries: dict[str, object] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if card.license:
        entries["license"] = card.license
    if is_hub_id(card.base):
        # The hub refuses a card whose base_model is not a hub id.
        entries["base_model"] = card.base
    if card.trigger_words:
        entries["instance_prompt"] = card.trigger_words[0]
    entries["tags"] = [*TAGS, *(tag for tag in card.tags if tag not in TAGS)]
    if card.gallery:
        entries["widget"] = [{"text": prompt, "output": {"url": picture}} for prompt, picture in card.gallery]
    return "---\n" + _yaml(entries) + "\n---"


def _usage(card: Card) -> list[str]:
    prompt = f"a photo of {card.trigger_words[0]}" if card.trigger_words else "a photo"
    base = public_name(card.base)
    link = f"[{base}](https://huggingface.co/{base})" if is_hub_id(base) else f"`{base}`"
    parts = []
    if card.diffusers_file:
        given = ", image=picture, mask_image=mask" if card.repaints else ""
        origin = json.dumps(base if is_hub_id(card.base) else f"path/to/{base}")
        parts += [
            "With diffusers, from the folder that holds this file:",
            "```python\n"
            f"from diffusers import {card.pipeline}\n\n"
            f"pipeline = {card.pipeline}.from_pretrained({origin})\n"
            f'pipeline.load_lora_weights(".", weight_name={json.dumps(card.diffusers_file)})\n'
            f'pipeline({json.dumps(prompt, ensure_ascii=False)}{given}).images[0].save("picture.png")\n'
            "```",
        ]
    if card.kohya_file:
        stem = Path(card.kohya_file).stem
        parts += [
            f"In ComfyUI: copy `{card.kohya_file}` to `models/loras` and choose it in a *Load LoRA* node.",
            f"In A1111 and Forge: copy `{card.kohya_file}` to `models/Lora` and write "
            f"`<lora:{stem}:1>` in the prompt.",
        ]
    if card.embeddings:
        parts.append(
            f"The learned words stand in `embeddings`: copy {', '.join(f'`{name}`' for name in card.embeddings)} to "
            "`models/embeddings` (ComfyUI) or `embeddings` (A1111); diffusers reads them with `load_textual_inversion`."
        )
    if card.author or card.license:
        stated = [f"by {card.author}"] * bool(card.author) + [f"licence {card.license}"] * bool(card.license)
        parts.append(f"Published {', '.join(stated)}. The base model's own licence holds for its use too.")
    return [
        *parts,
        f"The base model is {link}.",
    ]


def is_hub_id(base: str) -> bool:
    """Whether a base's name has the form owner/name."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", base))


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _yaml(entries: Mapping[str, object]) -> str:
    """YAML of the card's simple shape; values are written as JSON, which is YAML."""
    return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items())
