"""What a picture says about itself: everything that is needed to make it again, and nothing about who made it where."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from PIL import Image, PngImagePlugin
from pydantic import Field, ValidationError

from finetune.config import Section
from finetune.errors import ConfigError
from finetune.run_files import ADAPTER_FILE, RUN_FILE
from finetune.storage import sha256_file

KEY = "finetune_sample"
"""The PNG text entry that holds a `Shot` as JSON."""
A1111_KEY = "parameters"
"""The entry that A1111, Forge, ComfyUI and the model sites read."""


class UsedAdapter(Section):
    """An adapter that a picture was made with."""

    name: str
    """File name, without folders."""
    sha256: str
    """Of the file's bytes."""
    strength: float
    """1 is as trained."""


class Shot(Section):
    """All that decides the pixels of one picture."""

    prompt: str
    """What to draw."""
    negative_prompt: str = ""
    """What guidance steers away from."""
    seed: int
    """Of the noise it starts from."""
    steps: int
    """Denoising steps."""
    guidance_scale: float
    """Classifier-free guidance; 1 is off."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    scheduler: str | None = None
    """Name in SCHEDULERS; None is the checkpoint's own."""
    base: str
    """What the user called the base: demo, a hub id, or the name of a folder or file."""
    base_digest: str
    """SHA-256 over the base's weights."""
    dtype: str
    """Number format of the networks."""
    prediction: str | None = None
    """What the base predicts, where the user said so."""
    zero_terminal_snr: bool | None = None
    """Whether the last timestep is pure noise, where the user said so."""
    t5_tokens: int | None = None
    """How many tokens T5 reads; None is the family's own."""
    clip_skip: int | None = None
    """CLIP layer counted from the end; None is the family's own."""
    prompt_chunks: int = 1
    """How many times 75 tokens CLIP reads."""
    adapters: tuple[UsedAdapter, ...] = ()
    """In the order they were applied."""
    pictures: dict[str, str] = Field(default_factory=dict)
    """Role (image, mask, control) -> SHA-256 of what was given; controlnet, depth_model, refiner -> of its weights."""
    strength: float | None = None
    """Share of the noise schedule run on the given picture; None without one."""
    control_scale: float | None = None
    """How strongly the control picture is followed; None without one."""
    control_from: str | None = None
    """What made the control picture out of the given one, canny or depth; None showed it as it is."""
    refiner: str | None = None
    """What the user called the base that drew the last steps; None drew all with one."""
    refiner_start: float | None = None
    """Share of the noise schedule where the refiner took over."""
    upscale: float | None = None
    """Factor of the second pass; None is one pass."""
    upscale_strength: float | None = None
    """Share of the noise schedule run in the second pass."""

    def digest(self) -> str:
        """SHA-256 over all fields, 64 hex digits."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def parameters(self) -> str:
        """The text that A1111 writes and many programs show."""
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        facts = {
            "Steps": self.steps,
            "Sampler": self.scheduler or "checkpoint default",
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": self.base_digest[:10],
            "Model": self.base,
            **({"Clip skip": self.clip_skip} if self.clip_skip else {}),
            **({"Denoising strength": f"{self.strength:g}"} if self.strength is not None else {}),
            **({"Refiner": self.refiner, "Refiner switch at": f"{self.refiner_start:g}"} if self.refiner else {}),
            **({"Hires upscale": f"{self.upscale:g}"} if self.upscale else {}),
        }
        if self.adapters:
            hashes = ", ".join(f"{Path(used.name).stem}: {used.sha256[:12]}" for used in self.adapters)
            facts["Lora hashes"] = f'"{hashes}"'
            lines[0] += "".join(f" <lora:{Path(used.name).stem}:{used.strength:g}>" for used in self.adapters)
        lines.append(", ".join(f"{name}: {value}" for name, value in facts.items()))
        return "\n".join(lines)


def save(image: Image.Image, shot: Shot, path: Path) -> None:
    """Write a PNG with its papers, whole or not at all."""
    papers = PngImagePlugin.PngInfo()
    papers.add_itxt(KEY, shot.model_dump_json())
    papers.add_itxt(A1111_KEY, shot.parameters())
    beside = path.with_name(f".{path.name}.partial")
    try:
        image.save(beside, format="PNG", pnginfo=papers)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def shot_of(path: Path) -> Shot:
    """What a picture says about itself.

    Raises:
        ConfigError: if it is no picture of ours.
    """
    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {}).get(KEY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be read as a PNG: {reason}.") from None
    if text is None:
        raise ConfigError(
            f"{path} does not say how it was made: it holds no {KEY!r} entry. Single pictures that `finetune sample` "
            "wrote do (a sheet does not), unless another program saved them again."
        )
    try:
        return Shot.model_validate(json.loads(text))
    except (ValidationError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} has damaged papers: {str(error).splitlines()[0]}.") from None


def adapter_path(path: Path) -> Path:
    """The file or PEFT folder that holds an adapter's weights, of a run folder its finished one.

    Raises:
        ConfigError: if there is none.
    """
    if path.is_dir() and (path / ADAPTER_FILE).is_file():
        return path / ADAPTER_FILE
    if path.is_dir() and (path / RUN_FILE).is_file():
        raise ConfigError(f"{path} holds a run without a finished adapter; `finetune train {path}` finishes it.")
    if not path.exists():
        raise ConfigError(f"--adapter {path} does not exist; name a .safetensors file, a PEFT folder or a run folder.")
    return path


def adapter_digest(path: Path) -> str:
    """SHA-256 of the file that an adapter's weights are read from, 64 hex digits; over those of a folder of folders."""
    inside = (path / name for name in (ADAPTER_FILE, "adapter_model.safetensors", "pytorch_lora_weights.safetensors"))
    file = next((file for file in inside if file.is_file()), path)
    if file.is_file():
        return sha256_file(file)
    files = sorted(path.rglob("*.safetensors"))
    told = "".join(f"{file.relative_to(path).as_posix()} {sha256_file(file)}\n" for file in files)
    return hashlib.sha256(told.encode()).hexdigest()


def same_picture(path: Path, shot: Shot) -> bool:
    """Whether `path` is a whole picture of this very shot."""
    try:
        return path.is_file() and shot_of(path) == shot
    except ConfigError:
        return False
