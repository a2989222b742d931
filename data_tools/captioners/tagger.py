"""WD taggers: the probability of each of some ten thousand booru tags, from an ONNX file and a table of tags.

Source: the model cards of SmilingWolf/wd-*-tagger-v3 (input: BGR, 0 to 255, padded to a square with white; table:
tag_id, name, category, count; category 0 is general, 4 a character, 9 a rating).
"""

from __future__ import annotations

import csv
import importlib
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from numpy.typing import NDArray
from PIL import Image

from data_tools.captioners.vision import Asking, Say, how_to_fetch
from data_tools.errors import RefusedError, UsageError, shown
from data_tools.files import read_regular
from data_tools.text import MAX_TEXT_BYTES, decode_text

MODEL, TABLE = "model.onnx", "selected_tags.csv"
GENERAL, CHARACTER = "0", "4"
WORDS = re.compile(r"[a-z]{2}", re.IGNORECASE)


def load(name: str, asking: Asking) -> Say:
    """Open the model and its table of tags.

    Raises:
        UsageError: onnxruntime or the files are missing, the two do not fit, or options that mean nothing here.
    """
    if asking.prompts or asking.count != 1:
        raise UsageError(f"{name} gives one list of tags and reads no text: leave out --prompt and --number.")
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UsageError(f"{name} needs onnxruntime: pip install 'finetune[tagger]'.") from error
    paths = [_find(name, asking, file) for file in (MODEL, TABLE)]
    tags = _read_table(paths[1])
    try:
        session = runtime.InferenceSession(str(paths[0]), providers=_providers(runtime, asking.device))
    except Exception as error:  # the library raises many kinds of its own
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"{shown(str(paths[0]))} cannot be opened ({reason}); {how_to_fetch(name, asking)}."
        ) from error
    size, known = session.get_inputs()[0].shape, session.get_outputs()[0].shape[-1]
    if len(size) != 4 or size[1] != size[2] or size[3] != 3 or not isinstance(size[1], int):
        raise UsageError(
            f"{shown(str(paths[0]))} wants input of shape {size}; a tagger reads (pictures, side, side, 3)."
        )
    if isinstance(known, int) and known != len(tags):
        raise UsageError(
            f"{shown(str(paths[0]))} tells {known} tags, but {TABLE} lists {len(tags)}: they are of two models."
        )
    return _say(session, tags, asking, size)


def _say(session: Any, tags: list[tuple[str, str]], asking: Asking, size: Sequence[Any]) -> Say:
    limits = {GENERAL: asking.general, CHARACTER: asking.character}
    source, target = session.get_inputs()[0].name, session.get_outputs()[0].name

    def say(images: Sequence[Image.Image]) -> list[list[str]]:
        # keep: some exports are made for exactly one picture.
        step = size[0] if isinstance(size[0], int) and size[0] > 0 else len(images)
        pixels = [pixels_of(image, size[1]) for image in images]
        parts = []
        for start in range(0, len(pixels), step):
            part = np.stack(pixels[start : start + step])
            filled = np.concatenate([part, np.repeat(part[-1:], step - len(part), axis=0)])
            parts.append(session.run([target], {source: filled})[0][: len(part)])
        return [[choose_tags(tags, chances, limits)] for chances in np.concatenate(parts)]

    return say


def pixels_of(image: Image.Image, side: int) -> NDArray[np.float32]:
    """The picture in the middle of a white square, as (side, side, blue-green-red) in 0 to 255."""
    longer = max(image.size)
    square = Image.new("RGB", (longer, longer), (255, 255, 255))
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    return np.asarray(square.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)[:, :, ::-1]


def choose_tags(tags: Sequence[tuple[str, str]], chances: NDArray[np.float32], limits: dict[str, float]) -> str:
    """The tags from their limit on, characters first, then the likeliest, in one line."""
    chosen = [
        (category != CHARACTER, -float(chance), readable(name))
        for (name, category), chance in zip(tags, chances, strict=True)
        if category in limits and chance >= limits[category]
    ]
    return ", ".join(name for _, _, name in sorted(chosen))


def readable(tag: str) -> str:
    """`long_hair` -> `long hair`; faces such as `^_^` and `o_o` keep their underscore."""
    return tag.replace("_", " ") if WORDS.search(tag) else tag


def _find(name: str, asking: Asking, file: str) -> Path:
    place = asking.place(name)
    if Path(place).is_dir():
        if not (Path(place) / file).is_file():
            raise UsageError(f"{shown(place)} holds no {file}; {how_to_fetch(name, asking)}.")
        return Path(place) / file
    try:
        return Path(hf_hub_download(place, file, revision=asking.revision))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UsageError(
            f"{file} of {shown(place)} is not here and cannot be fetched ({type(error).__name__}); "
            f"{how_to_fetch(name, asking)}."
        ) from error


def _read_table(path: Path) -> list[tuple[str, str]]:
    """(name, category) of every tag, in the order of the model's output."""
    try:
        rows = list(csv.DictReader(StringIO(decode_text(read_regular(path, MAX_TEXT_BYTES)))))
    except RefusedError as refusal:
        raise UsageError(f"{shown(str(path))}: {refusal}.") from refusal
    if not rows or not {"name", "category"} <= rows[0].keys():
        raise UsageError(f"{shown(str(path))} has no columns name and category; it is no table of tags.")
    return [(row["name"] or "", row["category"] or "") for row in rows]


def _providers(runtime: Any, device: str | None) -> list[str]:
    gpu = "CUDAExecutionProvider"
    there = gpu in runtime.get_available_providers()
    if device not in (None, "cpu") and not there:
        raise UsageError(f"--device {device} needs onnxruntime-gpu; leave it out, or give cpu.")
    return [gpu, "CPUExecutionProvider"] if there and device != "cpu" else ["CPUExecutionProvider"]
