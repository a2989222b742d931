"""What model managers show beside a file: a small picture, and the trigger words."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from finetune import storage
from finetune.errors import ConfigError, nearest
from finetune.export.errors import ExportError
from finetune.export.job import ModelInfo
from finetune.export.privacy import private_parts
from finetune.families.base import ModelFamily

SIDE = 256
"""Longest side of a thumbnail in pixels."""
GENERATIONS = {"sd_v1": "SD1", "sd_v2": "SD2", "sdxl_base": "SDXL"}
"""Start of the architecture's kohya version -> what A1111 calls it in its user metadata."""
PLACES = {
    "comfyui": {"kohya": "models/loras", "single-file": "models/checkpoints", "embeddings": "models/embeddings"},
    "a1111": {"kohya": "models/Lora", "single-file": "models/Stable-diffusion", "embeddings": "embeddings"},
}
"""Program -> format -> folder below the program's own."""


def thumbnail(picture: Path) -> str:
    """A picture as a small JPEG in a data URL, for ModelSpec's header entry."""
    with Image.open(picture) as image:
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def write_sidecars(
    folder: Path, name: str, family: ModelFamily, triggers: Sequence[str], info: ModelInfo, face: Path | None
) -> list[Path]:
    """`NAME.json` and `NAME.png` beside `NAME.safetensors`, where A1111, Forge and InvokeAI look for them.

    Source: stable-diffusion-webui modules/ui_extra_networks_user_metadata.py.
    """
    start = family.kohya_base_version
    version = next((shown for known, shown in GENERATIONS.items() if start.startswith(known)), "Unknown")
    document = {
        "description": info.description,
        "sd version": version,
        "activation text": ", ".join(triggers),
        "preferred weight": 1.0,
        "notes": f"Licence: {info.license}" if info.license else "",
    }
    private = [part for text in document.values() for part in private_parts(str(text))]
    if problems := [f"{name}.json would hold {part}." for part in private]:
        raise ExportError("A file beside the adapter would reveal something private.", problems)
    storage.write_json(folder / f"{name}.json", document)
    if face is None:
        return [folder / f"{name}.json"]
    with Image.open(face) as image:
        small = image.convert("RGB")
    small.thumbnail((2 * SIDE, 2 * SIDE))
    write_picture(small, folder / f"{name}.png")
    return [folder / f"{name}.json", folder / f"{name}.png"]


def write_picture(image: Image.Image, target: Path) -> None:
    """Write a PNG of the pixels alone: what the picture's own file said (prompt, camera, place) stays behind."""
    stream = io.BytesIO()
    bare = Image.frombytes(image.mode, image.size, image.tobytes())
    bare.save(stream, "PNG")
    beside = target.with_name(f".{target.name}.part")
    with storage.disk_errors(target):
        beside.write_bytes(stream.getvalue())
        storage.publish(beside, target)


def places(where: str, formats: Iterable[str]) -> dict[str, Path]:
    """Format -> the folder where a program looks for such files; it may be missing where its neighbours are there.

    Args:
        where: "comfyui:FOLDER" or "a1111:FOLDER", the folder of the program itself.

    Raises:
        ConfigError: for a program that is not known, a folder that is not its own, or formats it has no place for.
    """
    program, _, text = where.partition(":")
    if program not in PLACES or not text:
        raise ConfigError(
            f"--install {where} is not understood{nearest(program, PLACES)}.",
            [f"write {' or '.join(f'{name}:FOLDER' for name in PLACES)}."],
        )
    folder = Path(text).expanduser()
    found = {name: folder / place for name, place in PLACES[program].items() if name in formats}
    problems = [f"{place} does not exist; is {folder} the folder of {program}?" for place in found.values()
                if not (place.is_dir() or (place.parent != folder and place.parent.is_dir()))]  # fmt: skip
    if not found:
        problems.append(f"{program} reads {', '.join(PLACES[program])}; export one of them.")
    if problems:
        raise ConfigError("The files cannot be installed:", problems)
    return found


def install(source: Path, folder: Path) -> list[Path]:
    """Copy an exported file with what lies beside it, or what an exported folder holds; the new files."""
    with storage.disk_errors(folder):
        folder.mkdir(exist_ok=True)
    files = sorted(source.iterdir()) if source.is_dir() else sorted(source.parent.glob(f"{source.stem}.*"))
    found = []
    for file in files:
        if file.suffix in {".safetensors", ".json", ".png"}:
            target = folder / file.name
            beside = target.with_name(f".{target.name}.part")
            with storage.disk_errors(target):
                shutil.copyfile(file, beside)
                storage.publish(beside, target)
            found.append(target)
    return found
