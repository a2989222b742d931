"""The model card: a README.md that the hub, a colleague and a search engine understand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from finetune import storage
from finetune.export.errors import ExportError
from finetune.export.privacy import private_parts, public_name
from finetune.families.places import DEMO

TAGS = ("lora", "diffusers", "text-to-image", "template:sd-lora")
WORD_TAGS = ("textual_inversion", "diffusers", "text-to-image")
"""Of files that hold learned words alone."""


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
        words: learned word -> its file in the folder `embeddings`.
        encoders: tensor in such a file -> the text encoder it is for; empty where a base has one.
        words_alone: whether nothing but words was learned.
        kohya_file: name of the file for A1111 and ComfyUI; empty if there is none.
        diffusers_file: name of the file for diffusers; empty if there is none.
        merged_folder, single_file: names of whole models with the adapter in them; empty if there are none.
        figures: (what, value) rows of the results table, e.g. ("subject fidelity", "0.83").
        training: (what, value) rows of the training table.
        data: (what, value) rows about the training pictures.
        gallery: (prompt, picture file inside the folder) for the hub's gallery.
        sheet: a contact sheet inside the folder, shown under the heading.
        architecture: ModelSpec's id of the base, such as "stable-diffusion-xl-v1-base"; the hub's tag comes of it.
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
    words: Mapping[str, str] = field(default_factory=dict)
    encoders: Mapping[str, str] = field(default_factory=dict)
    words_alone: bool = False
    kohya_file: str = ""
    diffusers_file: str = "pytorch_lora_weights.safetensors"
    merged_folder: str = ""
    single_file: str = ""
    figures: Sequence[tuple[str, str]] = ()
    training: Sequence[tuple[str, str]] = ()
    data: Sequence[tuple[str, str]] = ()
    gallery: Sequence[tuple[str, str]] = ()
    sheet: str = ""
    architecture: str = ""
    notes: Sequence[str] = field(default_factory=tuple)


def write_card(folder: Path, card: Card) -> Path:
    """Write `README.md` into the folder.

    Raises:
        ExportError: if the card would hold an absolute path, a token or the home folder.
    """
    text = render(card)
    if problems := [f"README.md would contain {part}; remove it." for part in private_parts(text)]:
        raise ExportError("The model card would reveal something private.", problems)
    path = folder / "README.md"
    storage.write_text(path, text)
    return path


def render(card: Card) -> str:
    """The whole card as Markdown with the hub's YAML header."""
    parts = [_front_matter(card), f"# {card.title}"]
    if card.description:
        parts.append(card.description)
    if card.gallery:
        # The hub draws the header's pictures here; other programs show nothing.
        parts.append("<Gallery />")
    if card.trigger_words:
        words = ", ".join(f"`{word}`" for word in card.trigger_words)
        parts.append(f"Use {words} in the prompt.")
    parts += ["## Use", *_usage(card)]
    sheet = f"![The same prompts and seeds without and with the adapter]({card.sheet})" if card.sheet else ""
    sections = {
        "Results": [sheet, _table(("measure", "value"), card.figures)],
        "Training data": [_table(("property", "value"), card.data)],
        "Training": [_table(("setting", "value"), card.training)],
        "Licence": [_licence(card)],
    }
    for heading, texts in sections.items():
        parts += [f"## {heading}", *filter(None, texts)] if any(texts) else []
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
    # "stable-diffusion-xl-v1-base" is filed under stable-diffusion-xl, "flux-1-dev" under flux.
    kind = WORD_TAGS if card.words_alone else TAGS
    entries["tags"] = [*kind, *filter(None, re.split(r"-v?\d", card.architecture)[:1])]
    if card.gallery:
        entries["widget"] = [{"text": prompt, "output": {"url": picture}} for prompt, picture in card.gallery]
    text = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=math.inf)
    return f"---\n{text}---"


def _usage(card: Card) -> list[str]:
    usual = f"a photo of {card.trigger_words[0]}" if card.trigger_words else "a photo"
    prompt = card.gallery[0][0] if card.gallery else usual
    base = public_name(card.base)
    link = f"[{base}](https://huggingface.co/{base})" if is_hub_id(base) else f"`{base}`"
    if card.base == DEMO:
        link = f"{link}, the tiny one that ships with `finetune`: the folder `finetune.demo.BASE_DIR`"
    parts = []
    if card.diffusers_file or card.words:
        given = ", image=picture, mask_image=mask" if card.repaints else ""
        origin = json.dumps(base if is_hub_id(card.base) else f"path/to/{base}")
        own = "from finetune.demo import BASE_DIR\n" if card.base == DEMO else ""
        loads = [f'pipeline.load_lora_weights(".", weight_name={json.dumps(card.diffusers_file)})\n']
        loads = [*(loads if card.diffusers_file else []), *_word_lines(card)]
        imports = "from safetensors.torch import load_file\n" if card.words and card.encoders else ""
        parts += [
            "With diffusers, in the folder of this file:",
            "```python\n"
            f"from diffusers import {card.pipeline}\n{own}{imports}\n"
            f"pipeline = {card.pipeline}.from_pretrained({'BASE_DIR' if own else origin})\n"
            f"{''.join(loads)}"
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
    if card.words:
        parts.append(
            f"The learned words are in `embeddings`: copy {', '.join(f'`{name}`' for name in card.words.values())} "
            "to `models/embeddings` (ComfyUI) or `embeddings` (A1111) and write the file's name in the prompt."
        )
    if card.merged_folder:
        parts.append(
            f"The folder `{card.merged_folder}` is the whole pipeline with the adapter merged in: "
            f'`{card.pipeline}.from_pretrained("{card.merged_folder}")`.'
        )
    if card.single_file:
        parts.append(
            f"The file `{card.single_file}` is the whole model, adapter merged in: copy it to `models/checkpoints` "
            "(ComfyUI) or `models/Stable-diffusion` (A1111, Forge)."
        )
    return [
        *parts,
        f"The base model is {link}.",
    ]


def _word_lines(card: Card) -> Iterator[str]:
    """What teaches a diffusers pipeline the words."""
    for word, name in card.words.items():
        file, token = json.dumps(f"embeddings/{name}"), f"token={json.dumps(word)}"
        if not card.encoders:
            yield f"pipeline.load_textual_inversion({file}, {token})\n"
        for key, encoder in card.encoders.items():
            reader = encoder.replace("text_encoder", "tokenizer")
            yield (
                f"pipeline.load_textual_inversion(load_file({file})[{json.dumps(key)}], {token},\n"
                f"    text_encoder=pipeline.{encoder}, tokenizer=pipeline.{reader})\n"
            )


def _licence(card: Card) -> str:
    owner = f"Made by {card.author}. " if card.author else ""
    stated = (
        f"The files are published under `{card.license}`." if card.license else
        "No licence is stated, so others may not redistribute the files. The author can set `export.license` in the "
        "recipe (an SPDX id, or a licence name of the hub, such as `openrail++`) and build again."
    )  # fmt: skip
    return f"{owner}{stated} The licence of the base model applies as well."


def is_hub_id(base: str) -> bool:
    """Whether a base's name has the form owner/name."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", base))


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    """Empty without rows."""
    if not rows:
        return ""
    lines = [head, ("---", "---"), *rows]
    return "\n".join(
        # A bare <word> would be taken for HTML and vanish.
        "| " + " | ".join(re.sub(r"([|<])", r"\\\1", str(cell)) for cell in line) + " |" for line in lines
    )
