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
from finetune.demo.build.autoencoder import reconstruct, to_pixels
from finetune.demo.build.loop import Progress, Settings, initialise, train
from finetune.demo.build.pictures import junk, random_colour
from finetune.demo.checker import NAMES, NONE, Checker, CheckerNet
from finetune.demo.scenes import COLOURS, POSITIONS, SIZES, draw_array, labels, random_scene
from finetune.demo.shapes import OBJECTS, Array
from finetune.demo.subjects import SUBJECTS, neon_array, subject_array

IGNORED = -100
WEIGHTS = {"object": 2.0, "first": 2.0, "second": 2.0}
"""What a wrong answer costs by attribute; 0.5 for the others."""
CONFUSIONS = ("object", "colour", "background", "size", "position", "layout", "first", "second")
"""Attributes whose confusions the card shows."""
Labelled = tuple[Array, dict[str, str]]


def _named(rng: np.random.Generator) -> Labelled:
    """An ordinary scene with everything known."""
    scene = random_scene(rng, plain=0.4)
    if rng.random() < 0.10:
        scene = replace(scene, style="outline")
    elif rng.random() < 0.15:
        scene = replace(scene, texture="striped" if rng.random() < 0.5 else "dotted")
    return draw_array(scene), labels(scene)


def _pair(rng: np.random.Generator) -> Labelled:
    """Two objects."""
    scene = random_scene(rng, mixed=1.0, pairs=1.0)
    return draw_array(scene), labels(scene)


def _subject(rng: np.random.Generator) -> Labelled:
    """A demo subject; it has no single colour."""
    subject = list(SUBJECTS.values())[int(rng.integers(len(SUBJECTS)))]
    ground, size, position = (list(table)[int(rng.integers(len(table)))] for table in (COLOURS, SIZES, POSITIONS))
    found = {"object": f"{subject.trigger} {subject.class_word}", "background": ground, "size": size,
             "position": position, "style": "flat", "layout": "alone"}  # fmt: skip
    return subject_array(subject.name, rng, background=ground, size=size, position=position), found


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
    found = labels(scene)
    del found["colour"]
    return draw_array(replace(scene, colours=colours)), found


def _neon(rng: np.random.Generator) -> Labelled:
    thing, colour = list(OBJECTS)[int(rng.integers(len(OBJECTS)))], list(COLOURS)[int(rng.integers(9))]
    return neon_array(thing, colour, rng), {"object": thing, "style": "neon", "layout": "alone"}


def _junk(rng: np.random.Generator) -> Labelled:
    return junk(rng), {"object": NONE}


KINDS: tuple[tuple[float, Callable[[np.random.Generator], Labelled]], ...] = (
    (0.48, _named), (0.16, _pair), (0.09, _subject), (0.09, lookalike), (0.04, _neon), (0.14, _junk)
)  # fmt: skip


def labelled_pictures(count: int, seed: int) -> tuple[Array, Tensor]:
    """Pictures, uint8 (N, 64, 64, 3), and the index of every attribute's name, (N, attributes); -100 means unknown."""
    pictures, answers = [], []
    shares = [share for share, _ in KINDS]
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        picture, names = KINDS[int(rng.choice(len(KINDS), p=shares))][1](rng)
        pictures.append(picture)
        answers.append([NAMES[key].index(names[key]) if key in names else IGNORED for key in NAMES])
    return np.stack(pictures), torch.tensor(answers)


def _augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, brightness, noise and small shifts, each sample its own."""
    size = (len(pixels), 1, 1, 1)
    blur = torch.rand(size, generator=generator) * (torch.rand(size, generator=generator) < 0.5)
    pixels = pixels + blur * (nn.functional.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False) - pixels)
    pixels = pixels * (1 + 0.08 * torch.randn(size, generator=generator))
    pixels = pixels + 0.04 * torch.randn(size, generator=generator)
    level = 0.12 * torch.rand(size, generator=generator)
    return (pixels + level * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1)


def checker_loss(net: CheckerNet, pixels: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy of the attributes, summed, over all pictures; the hardest weighs most."""
    _, logits = net(pixels)
    total = pixels.new_zeros(())
    for column, name in enumerate(NAMES):
        loss = nn.functional.cross_entropy(logits[name], answers[:, column], ignore_index=IGNORED, reduction="sum")
        total = total + WEIGHTS.get(name, 0.5) * loss
    return total / len(pixels)


def train_checker(vae: AutoencoderKL, settings: Settings, file: Path, count: int = 24000) -> tuple[Checker, Progress]:
    """Train on true pictures and as many reconstructed ones, write the weights to `file`."""
    pictures, answers = labelled_pictures(count, seed=21)
    rebuilt = reconstruct(vae, pictures[: count // 2])
    pictures, answers = np.concatenate([pictures, rebuilt]), torch.cat([answers, answers[: count // 2]])
    net = CheckerNet()
    initialise(net, torch.Generator().manual_seed(settings.seed))

    def loss_of(share: float, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        chosen = rng.integers(len(pictures), size=settings.batch)
        return checker_loss(net, _augment(to_pixels(pictures[chosen]), generator), answers[chosen])

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
def answers_of(net: CheckerNet, pictures: Array) -> Tensor:
    """The index of the likeliest name of every attribute; shape (N, attributes)."""
    rows = []
    for start in range(0, len(pictures), 100):
        logits = net(to_pixels(pictures[start : start + 100]))[1]
        rows.append(torch.stack([logits[name].argmax(-1) for name in NAMES], 1))
    return torch.cat(rows)


def accuracy(guesses: Tensor, answers: Tensor) -> dict[str, float]:
    """Share of known attributes that are named rightly; attribute -> 0..1. Both of shape (N, attributes)."""
    known = answers != IGNORED
    right = (guesses == answers) & known
    return {name: float(right[:, i].sum() / known[:, i].sum().clamp(min=1)) for i, name in enumerate(NAMES)}


def validate_checker(checker: Checker, vae: AutoencoderKL, count: int = 3000) -> dict[str, object]:
    """Accuracy on unseen pictures and on their reconstructions, subject recall and false alarms, confusions."""
    pictures, answers = labelled_pictures(count, seed=22)
    guesses = answers_of(checker.net, reconstruct(vae, pictures))
    report: dict[str, object] = {"true": accuracy(answers_of(checker.net, pictures), answers)}
    report["reconstructed"] = accuracy(guesses, answers)
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
    report["confusions"] = {name: confusion(guesses, answers, name) for name in CONFUSIONS}
    return report


def confusion(guesses: Tensor, answers: Tensor, name: str) -> list[list[int]]:
    """Counts of the true name (row) against the named one (column) of one attribute, in the order of `NAMES`."""
    column, size = list(NAMES).index(name), len(NAMES[name])
    known = answers[:, column] != IGNORED
    pairs = answers[known, column] * size + guesses[known, column]
    return torch.bincount(pairs, minlength=size * size).view(size, size).tolist()
