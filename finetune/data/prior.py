"""Class pictures for prior preservation: rendered by the base model where the folder holds too few. Resumable."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from data_tools.images import SUFFIXES
from finetune.config import PriorConfig
from finetune.data.dataset import Picture
from finetune.errors import DataError
from finetune.families.base import Components, ModelFamily
from finetune.rng import seed_for
from finetune.sampling.generate import generate
from finetune.storage import write_json, write_text
from finetune.tracking import Reporter

RECORD = "class_images.json"
"""What the generated pictures of a folder were made with."""
JOURNAL = "class_images.jsonl"
"""One line per generated picture: the digest of its file, and all that decides what it shows."""
RENDERED = "class-"
"""How the names of rendered pictures begin; all others are the user's."""


def fill(
    folder: Path, prior: PriorConfig, family: ModelFamily, components: Components,
    sizes: Sequence[tuple[int, int]], reporter: Reporter, *, have: int = 0,
) -> int:  # fmt: skip
    """Render class pictures until the folder holds `prior.images`; how many were rendered now.

    Picture i gets prompt i (going round the prompts) and a seed that depends on i only, so a stopped call goes on
    where it was, and a finished folder serves every run on the same base, whatever that run's own seed. Pictures the
    user put there count.

    Args:
        sizes: (height, width) in pixels, used in turn; usually those of the subject's pictures.
        have: class pictures that lie elsewhere and count.

    Raises:
        DataError: if the folder holds pictures rendered with another base, other prompts or other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "base_digest": components.digest,
        "inference_steps": prior.inference_steps,
        "guidance_scale": prior.guidance_scale,
    }
    made_with = settings | {"prompts": list(prior.prompts)}
    _check_record(folder, made_with)
    own = [p for p in _pictures(folder) if not p.name.startswith(RENDERED)]
    wanted = [folder / f"{RENDERED}{i:05d}.png" for i in range(max(0, prior.images - have - len(own)))]
    missing = [i for i, path in enumerate(wanted) if not (path.is_file() and path.with_suffix(".txt").is_file())]
    if not missing:
        return 0
    write_json(folder / RECORD, made_with)
    with reporter.progress("Rendering class pictures", len(wanted), len(wanted) - len(missing)) as advance:
        for done, batch in _batches(missing, sizes, prior.batch_size):
            height, width = sizes[batch[0] % len(sizes)]
            prompts = [prior.prompts[i % len(prior.prompts)] for i in batch]
            seeds = [seed_for(0, "class picture", i) % 2**31 for i in batch]
            images = generate(
                family, components, prompts, seeds=seeds,
                steps=prior.inference_steps, guidance_scale=prior.guidance_scale, height=height, width=width,
                batch_size=prior.batch_size,
            )  # fmt: skip
            for i, seed, prompt, image in zip(batch, seeds, prompts, images, strict=True):
                write_text(wanted[i].with_suffix(".txt"), prompt + "\n")
                made = settings | {"prompt": prompt, "seed": seed, "height": height, "width": width}
                _publish(image, wanted[i], made)
            advance(len(wanted) - len(missing) + done, "")
    return len(missing)


def has_pictures(folder: Path) -> bool:
    """Whether there is anything to read in the class folder."""
    return next(_pictures(folder), None) is not None


def _pictures(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def chosen(pictures: Sequence[Picture], images: int) -> list[Picture]:
    """The class pictures that are used: all that the user put there, filled up with rendered ones to `images`."""
    own = [p for p in pictures if not p.path.name.startswith(RENDERED)]
    rendered = [p for p in pictures if p.path.name.startswith(RENDERED)]
    return [*own, *rendered[: max(0, images - len(own))]]


def _batches(
    missing: Sequence[int], sizes: Sequence[tuple[int, int]], batch_size: int
) -> Iterator[tuple[int, list[int]]]:
    """Numbers of pictures of one size that are rendered together, with how many are done after them."""
    done = 0
    for size in sorted(set(sizes)):
        same = [i for i in missing if sizes[i % len(sizes)] == size]
        for start in range(0, len(same), batch_size):
            batch = same[start : start + batch_size]
            done += len(batch)
            yield done, batch


def origins(folder: Path) -> dict[str, str]:
    """What generated pictures count as: the digest of a picture's file -> that of all that decides what it shows.

    Two GPUs draw the same picture with other last bits; it is the same picture. One that somebody changed since it was
    drawn has another digest, and is not in here.
    """
    journal = folder / JOURNAL
    found = {}
    for line in journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else ():
        try:
            entry = json.loads(line)
            made = json.dumps(entry["made_with"], sort_keys=True)
            found[entry["sha256"]] = hashlib.sha256(made.encode()).hexdigest()
        except (ValueError, KeyError, TypeError):  # the torn line of a call that was killed
            continue
    return found


def _publish(image: Image.Image, path: Path, made_with: dict[str, Any]) -> None:
    """Save whole or not at all, and note how it was made; a picture that another job made meanwhile stays, for it may
    be in use.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".partial", delete=False) as stream:
        image.save(stream, format="PNG")
    partial = Path(stream.name)
    with suppress(PermissionError):  # a mounted drive may have no modes to change
        partial.chmod(0o644)
    entry = {"file_name": path.name, "sha256": hashlib.sha256(partial.read_bytes()).hexdigest(), "made_with": made_with}
    # keep: noted before it is there, so that no picture is there without its note; begun on a new line, because the
    # last one of a call that was killed may be torn.
    with (path.parent / JOURNAL).open("a", encoding="utf-8") as journal:
        journal.write(f"\n{json.dumps(entry, ensure_ascii=False)}\n")
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    except OSError:  # a disk without hard links, such as a mounted drive
        partial.replace(path)
    partial.unlink(missing_ok=True)


def _check_record(folder: Path, made_with: dict[str, Any]) -> None:
    record = folder / RECORD
    if not record.is_file():
        return
    before = json.loads(record.read_text(encoding="utf-8"))
    changed = [f"{key} was {before.get(key)!r} and is now {made_with[key]!r}" for key in made_with
               if before.get(key) != made_with[key]]  # fmt: skip
    if changed:
        raise DataError(
            f"{folder} holds class pictures that were rendered differently; name another data.prior.folder, or delete "
            "this one to render anew:",
            changed,
        )
