"""How the checker is trained and validated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from finetune.demo import shapes
from finetune.demo.autoencoder import reconstruct, to_pixels
from finetune.demo.checker import NAMES, NONE, Checker, CheckerNet
from finetune.demo.loop import Progress, Settings, initialise, train
from finetune.demo.pictures import junk, random_colour
from finetune.demo.scenes import COLOURS, POSITIONS, SIZES, draw_array, random_scene
from finetune.demo.shapes import OBJECTS, Array
from finetune.demo.subjects import SUBJECTS, neon_array, subject_array

IGNORED = -100
Labelled = tuple[Array, dict[str, str]]


def _named(rng: np.random.Generator) -> Labelled:
    """An ordinary scene with everything known."""
    scene = random_scene(rng, plain=0.4)
    if rng.random() < 0.08:
        scene = replace(scene, style="outline")
    if rng.random() < 0.04:
        scene = replace(scene, texture="striped" if rng.random() < 0.5 else "dotted")
    names = ("object", "colour", "background", "size", "position", "style")
    return draw_array(scene), {name: getattr(scene, name) for name in names}


def _subject(rng: np.random.Generator) -> Labelled:
    """A demo subject; it has no single colour."""
    subject = list(SUBJECTS.values())[int(rng.integers(len(SUBJECTS)))]
    ground, size, position = (list(table)[int(rng.integers(len(table)))] for table in (COLOURS, SIZES, POSITIONS))
    labels = {"object": f"{subject.trigger} {subject.class_word}", "background": ground, "size": size,
              "position": position, "style": "flat"}  # fmt: skip
    return subject_array(subject.name, rng, background=ground, size=size, position=position), labels


def lookalike(rng: np.random.Generator) -> Labelled:
    """An ordinary object in a subject's colours or in free ones: still the ordinary object."""
    scene = random_scene(rng, plain=0.5)
    if rng.random() < 0.6:
        scene = replace(scene, object=list(SUBJECTS)[int(rng.integers(len(SUBJECTS)))])
    roles, pool = ("body", "shade", "light", "ink"), list(shapes.SUBJECT_PALETTE.values())
    colours = {
        role: pool[int(rng.integers(len(pool)))] if rng.random() < 0.7 else random_colour(rng)
        for role in roles
        if role == "body" or rng.random() < 0.5
    }
    labels = {name: getattr(scene, name) for name in ("object", "background", "size", "position", "style")}
    return draw_array(replace(scene, colours=colours)), labels


def _neon(rng: np.random.Generator) -> Labelled:
    thing, colour = list(OBJECTS)[int(rng.integers(len(OBJECTS)))], list(COLOURS)[int(rng.integers(9))]
    return neon_array(thing, colour, rng), {"object": thing, "style": "neon"}


def _junk(rng: np.random.Generator) -> Labelled:
    return junk(rng), {"object": NONE}


KINDS: tuple[tuple[float, Callable[[np.random.Generator], Labelled]], ...] = (
    (0.60, _named), (0.10, _subject), (0.10, lookalike), (0.04, _neon), (0.16, _junk)
)  # fmt: skip


def labelled_pictures(count: int, seed: int) -> tuple[Array, Tensor]:
    """Pictures, uint8 (N, 64, 64, 3), and the index of every attribute's name, (N, attributes); -100 means unknown."""
    pictures, labels = [], []
    shares = [share for share, _ in KINDS]
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        picture, names = KINDS[int(rng.choice(len(KINDS), p=shares))][1](rng)
        pictures.append(picture)
        labels.append([NAMES[key].index(names[key]) if key in names else IGNORED for key in NAMES])
    return np.stack(pictures), torch.tensor(labels)


def _augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, brightness, noise and small shifts, each sample its own."""
    size = (len(pixels), 1, 1, 1)
    blur = torch.rand(size, generator=generator) * (torch.rand(size, generator=generator) < 0.5)
    pixels = pixels + blur * (nn.functional.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False) - pixels)
    pixels = pixels * (1 + 0.08 * torch.randn(size, generator=generator))
    pixels = pixels + 0.04 * torch.randn(size, generator=generator)
    level = 0.12 * torch.rand(size, generator=generator)
    return (pixels + level * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1)


def checker_loss(net: CheckerNet, pixels: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the attributes; objects count double."""
    _, logits = net(pixels)
    total = pixels.new_zeros(())
    for column, name in enumerate(NAMES):
        if bool((labels[:, column] != IGNORED).any()):
            weight = 2.0 if name == "object" else 0.5
            loss = nn.functional.cross_entropy(logits[name], labels[:, column], ignore_index=IGNORED)
            total = total + weight * loss
    return total


def train_checker(vae: AutoencoderKL, settings: Settings, file: Path, count: int = 24000) -> tuple[Checker, Progress]:
    """Train on true pictures and as many reconstructed ones, write the weights to `file`."""
    pictures, labels = labelled_pictures(count, seed=21)
    rebuilt = reconstruct(vae, pictures[: count // 2])
    pictures, labels = np.concatenate([pictures, rebuilt]), torch.cat([labels, labels[: count // 2]])
    net = CheckerNet()
    initialise(net, torch.Generator().manual_seed(settings.seed))

    def loss_of(share: float, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        chosen = rng.integers(len(pictures), size=settings.batch)
        return checker_loss(net, _augment(to_pixels(pictures[chosen]), generator), labels[chosen])

    progress = train(net, settings, loss_of)
    # keep: BatchNorm's statistics belong to the last weights, not to the averaged ones now in the network.
    _refresh_statistics(net, pictures, settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {name: t.half() if t.is_floating_point() else t for name, t in net.state_dict().items()}
    save_file(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)
    net.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})
    return Checker(net), progress


@torch.no_grad()
def _refresh_statistics(net: CheckerNet, pictures: Array, settings: Settings) -> None:
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean over the batches
    rng, generator = np.random.default_rng((settings.seed, 9)), torch.Generator().manual_seed(settings.seed)
    for _ in range(min(60, len(pictures) // 64 + 1)):
        net(_augment(to_pixels(pictures[rng.integers(len(pictures), size=64)]), generator))
    net.eval()


@torch.no_grad()
def accuracy(net: CheckerNet, pictures: Array, labels: Tensor) -> dict[str, float]:
    """Share of known attributes that the network names rightly; attribute -> 0..1."""
    guesses: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for start in range(0, len(pictures), 100):
        for name, logits in net(to_pixels(pictures[start : start + 100]))[1].items():
            guesses[name].append(logits.argmax(-1))
    shares = {}
    for column, name in enumerate(NAMES):
        known = labels[:, column] != IGNORED
        shares[name] = float((torch.cat(guesses[name]) == labels[:, column])[known].float().mean())
    return shares


def validate_checker(checker: Checker, vae: AutoencoderKL, count: int = 2000) -> dict[str, object]:
    """Accuracy on unseen pictures and on their reconstructions, subject recall and false alarms, confusions."""
    pictures, labels = labelled_pictures(count, seed=22)
    rebuilt = reconstruct(vae, pictures)
    report: dict[str, object] = {"true": accuracy(checker.net, pictures, labels)}
    report["reconstructed"] = accuracy(checker.net, rebuilt, labels)
    report["n"] = count
    each = max(8, count // 10)
    for subject in SUBJECTS.values():
        name = f"{subject.trigger} {subject.class_word}"
        shown = np.stack([subject_array(subject.name, np.random.default_rng((23, i))) for i in range(each)])
        alike = np.stack([lookalike(np.random.default_rng((24, i)))[0] for i in range(each)])
        for kind, pictures_of in (("true", lambda p: p), ("reconstructed", lambda p: reconstruct(vae, p))):
            hits = [v.object == name for v in checker.judge(to_pixels(pictures_of(shown)))]
            alarms = [v.object == name for v in checker.judge(to_pixels(pictures_of(alike)))]
            report[f"{name}, {kind}"] = {
                "recall": float(np.mean(hits)),
                "false alarms": float(np.mean(alarms)),
            }
    report["confusion"] = confusion(checker, rebuilt, labels)
    return report


def confusion(checker: Checker, pictures: Array, labels: Tensor) -> list[list[int]]:
    """Counts of true object (row) against named object (column), in the order of `NAMES["object"]`."""
    names = NAMES["object"]
    table = [[0] * len(names) for _ in names]
    for verdict, truth in zip(checker.judge(to_pixels(pictures)), labels[:, 0].tolist(), strict=True):
        table[truth][names.index(verdict.object)] += 1
    return table
