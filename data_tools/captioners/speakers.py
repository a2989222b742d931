"""Models of transformers that put a picture into words: BLIP, BLIP-2, Florence-2, SmolVLM, Qwen-VL.

Weights are safetensors only, and code that comes with a model is never run. Sources: transformers 5.23, the modules
blip, blip_2, florence2, smolvlm, qwen2_vl.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from data_tools.captioners.vision import VISION, Asking, Say, how_to_fetch
from data_tools.errors import DataToolsError, UsageError, counted, shown
from data_tools.models import UNREADABLE, Source, choose_device, moved, reason_of

FLORENCE_TASKS = ("<CAPTION>", "<DETAILED_CAPTION>", "<MORE_DETAILED_CAPTION>")
"""Those that answer in words; the others answer with boxes."""
RESOURCES = 9
"""Exit code where the memory does not suffice."""
Pictures = list[Image.Image]


@dataclass(frozen=True)
class Reader:
    """How pictures and a prompt become a model's input, and its output tokens words."""

    encode: Callable[[Pictures, str], dict[str, Any]]
    decode: Callable[[Tensor], list[str]]
    echoes: bool
    """Whether the output begins with the input's tokens."""


def load(name: str, asking: Asking) -> Say:
    """Load a model of `VISION` and what turns pictures into its input.

    Raises:
        UsageError: no weights, weights of another model, incomplete ones, or a prompt it cannot follow.
        DataToolsError: pickled weights, exit code 8.
    """
    source = Source(asking.place(name), asking.revision)
    source.refuse_pickles()
    device = choose_device(asking.device)
    try:
        config = source.load(AutoConfig)
        if config.model_type not in VISION[name].types:
            raise _another_model(name, source.place, config.model_type)
        reader = READERS[name](source, config)
        model = source.model(AutoModelForImageTextToText, device)
    except UNREADABLE as error:
        raise UsageError(
            f"{name} cannot be loaded from {shown(source.place)} ({reason_of(error)}); {how_to_fetch(name, asking)}."
        ) from error
    prompts = asking.prompts or VISION[name].prompts
    if name == "florence2":
        _check_tasks(prompts)
    return _speak(model, reader, prompts, asking)


def _another_model(name: str, place: str, found: str) -> UsageError:
    fitting = next((other for other, model in VISION.items() if found in model.types), None)
    hint = f"use --captions {fitting}" if fitting else f"take {VISION[name].place}, or one like it"
    return UsageError(
        f"{shown(place)} is a {found!r} model, and --captions {name} reads {', '.join(VISION[name].types)}; {hint}."
    )


def _check_tasks(prompts: Sequence[str]) -> None:
    odd = [prompt for prompt in prompts if prompt.startswith("<") and prompt not in FLORENCE_TASKS]
    if odd:
        raise UsageError(f"--prompt {odd[0]!r} does not answer in words; Florence-2 has {', '.join(FLORENCE_TASKS)}.")


def _speak(model: Any, reader: Reader, prompts: Sequence[str], asking: Asking) -> Say:
    # keep: what a model's own settings say of sampling has no meaning without it, and would be warned about.
    model.generation_config.update(temperature=None, top_p=None, top_k=None)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and asking.length >= room:
        raise UsageError(f"--length {asking.length} is more than this model can say: it has {room} places for tokens.")
    beams = max(asking.count, model.generation_config.num_beams or 1)

    def one(pictures: Pictures, prompt: str) -> list[list[str]]:
        inputs = moved(reader.encode(pictures, prompt), model)
        output = model.generate(
            **inputs, do_sample=False, num_beams=beams, num_return_sequences=asking.count, max_new_tokens=asking.length
        )
        start = inputs["input_ids"].shape[1] if reader.echoes else 0
        texts = reader.decode(output[:, start:])
        return [texts[place : place + asking.count] for place in range(0, len(texts), asking.count)]

    @torch.inference_mode()
    def say(images: Sequence[Image.Image]) -> list[list[str]]:
        try:
            columns = [one(list(images), prompt) for prompt in prompts]
        except (torch.OutOfMemoryError, RuntimeError, ValueError, IndexError) as error:
            raise _stopped(error, len(images)) from error
        return [[text for column in columns for text in column[place]] for place in range(len(images))]

    return say


def _stopped(error: Exception, pictures: int) -> DataToolsError:
    full = isinstance(error, torch.OutOfMemoryError)
    remedy = "give a smaller --batch or --number" if full else "try --batch 1, a shorter --prompt or --length"
    return DataToolsError(
        f"The model stopped at a batch of {counted(pictures, 'picture')} ({reason_of(error)}); {remedy}, and "
        "start again: what is written stays written.",
        exit_code=RESOURCES if full else None,
    )


def _prompted(source: Source, config: Any) -> Reader:
    """BLIP: the prompt is the beginning of the caption and stays in it."""
    processor = source.load(AutoProcessor, backend="pil")

    def encode(pictures: Pictures, prompt: str) -> dict[str, Any]:
        text = {"text": [prompt] * len(pictures)} if prompt else {}
        return dict(processor(images=pictures, return_tensors="pt", **text))

    return Reader(encode, _words(processor.tokenizer), echoes=False)


def _answering(source: Source, config: Any) -> Reader:
    """BLIP-2: 32 picture tokens, then the prompt, then the answer."""
    processor = source.load(AutoProcessor, backend="pil")
    processor.num_query_tokens = processor.num_query_tokens or config.num_query_tokens

    def encode(pictures: Pictures, prompt: str) -> dict[str, Any]:
        return dict(processor(images=pictures, text=[prompt] * len(pictures), return_tensors="pt"))

    return Reader(encode, _words(processor.tokenizer), echoes=not config.text_config.is_encoder_decoder)


def _tasked(source: Source, config: Any) -> Reader:
    """Florence-2: a task word, or a question, for an encoder and a decoder."""
    processor = source.load(AutoProcessor, backend="pil")

    def encode(pictures: Pictures, prompt: str) -> dict[str, Any]:
        return dict(processor(images=pictures, text=[prompt] * len(pictures), return_tensors="pt", padding=True))

    return Reader(encode, _words(processor.tokenizer), echoes=False)


# keep: their processors would also load one for videos, which needs torchvision; pictures do not.
def _smol(source: Source, config: Any) -> Reader:
    """SmolVLM: a chat; large pictures come as tiles and as a whole."""
    processor, tokenizer, ask = _chat(source)
    vision = config.vision_config
    length = int((vision.image_size // vision.patch_size) ** 2 / config.scale_factor**2)

    def encode(pictures: Pictures, prompt: str) -> dict[str, Any]:
        seen = processor(images=[[picture] for picture in pictures], return_row_col_info=True, return_tensors="pt")
        rows, columns = seen.pop("rows"), seen.pop("cols")
        texts = [
            ask(prompt).replace(
                "<image>",
                get_image_prompt_string(
                    int(row[0]), int(column[0]), length, "<fake_token_around_image>", "<image>", "<global-img>"
                ),
            )
            for row, column in zip(rows, columns, strict=True)
        ]
        return {**tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False), **seen}

    return Reader(encode, _words(tokenizer), echoes=True)


def _qwen(source: Source, config: Any) -> Reader:
    """Qwen-VL: a chat; as many picture tokens as the picture is large."""
    processor, tokenizer, ask = _chat(source)
    token = tokenizer.convert_ids_to_tokens(config.image_token_id)

    def encode(pictures: Pictures, prompt: str) -> dict[str, Any]:
        seen = dict(processor(images=pictures, return_tensors="pt"))
        lengths = seen["image_grid_thw"].prod(dim=-1) // processor.merge_size**2
        texts = [ask(prompt).replace(token, token * int(length)) for length in lengths]
        inputs = dict(tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False))
        marks = (inputs["input_ids"] == config.image_token_id).long()
        return {**inputs, "mm_token_type_ids": marks, **seen}

    return Reader(encode, _words(tokenizer), echoes=True)


def _chat(source: Source) -> tuple[Any, Any, Callable[[str], str]]:
    """The picture processor, the tokenizer, and what writes a prompt as the user's turn of a chat."""
    processor = source.load(AutoImageProcessor, backend="pil")
    # keep: answers follow the last token, so what fills up shorter prompts must stand before them.
    tokenizer = source.load(AutoTokenizer, padding_side="left")
    parts, _ = ProcessorMixin.get_processor_dict(source.place, revision=source.revision or "main")
    template = parts.get("chat_template") or tokenizer.chat_template
    if template is None:
        raise ValueError("there is no chat template in it")

    def ask(prompt: str) -> str:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
        text: str = tokenizer.apply_chat_template(
            [turn], chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return text

    return processor, tokenizer, ask


def _words(tokenizer: Any) -> Callable[[Tensor], list[str]]:
    def decode(tokens: Tensor) -> list[str]:
        return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    return decode


READERS: dict[str, Callable[[Source, Any], Reader]] = {
    "blip": _prompted,
    "blip2": _answering,
    "florence2": _tasked,
    "smolvlm": _smol,
    "qwen_vl": _qwen,
}
