"""The model card, written from the measured figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.demo.build.checker_training import KINDS
from finetune.demo.build.measure import GUIDANCE, STEPS
from finetune.demo.checker import NAMES
from finetune.demo.scenes import COLOURS, POSITIONS, SIZES
from finetune.demo.shapes import OBJECTS

HEAD = """# The embedded base model

A real Stable Diffusion pipeline at toy size: it draws {objects} single objects in {colours} colours at 64 x 64 pixels
and follows its captions, so that fine-tuning can be shown and measured on a laptop without a network. Load it with
`StableDiffusionPipeline.from_pretrained(finetune.demo.BASE_DIR, safety_checker=None)`.

![samples](samples.png)

Rows of the sheet: "a ball", "a box", ...; two rows with a colour and a background; two with everything named; two
objects; stripes, dots and outlines.

* **Parts:** AutoencoderKL (4x smaller, 8 latent channels), UNet2DConditionModel with cross-attention, CLIPTextModel
  (128 wide, 3 layers), CLIPTokenizer (32 tokens; `sks`, `ohwx`, `zwx`, `mxv` are words of their own that no caption
  used). float16 safetensors, {megabytes} MB in all.
* **Noise:** `v_prediction`, linear betas 1e-4 to 0.02, 1000 steps. `scaling_factor` is 1: latents have unit variance.
* **Data:** pictures drawn by `finetune/demo/scenes.py`; no photograph, no third-party picture, no person. The demo
  subjects were in no training picture of any part; the neon style in none of UNet and text encoder, though the
  autoencoder has seen other things drawn that way.
* **Built by** `python -m finetune.demo.build`; the figures below are written by it (also in `figures.json`).

Objects: {object_names}. Colours and backgrounds: {colour_names}. Sizes: {sizes}. Positions: {positions}.
"""


def percent(share: float) -> str:
    """0.853 -> "85.3 %"."""
    return f"{100 * share:.1f} %"


CHANCES = {"object": len(OBJECTS), "colour": len(COLOURS), "background": len(COLOURS), "size": 3, "position": 5,
           "texture": 3, "style": 3}  # fmt: skip
"""Attribute -> number of answers it may have."""


def _following(figures: Mapping[str, Any]) -> list[str]:
    groups = [figures[f"{kind} prompts"] for kind in ("plain", "full", "look")]
    lines = [
        "## Prompt following",
        "",
        f"{figures['prompts']} prompts of either kind (looks: a third), {figures['seeds']} sampling seed(s), "
        f"{STEPS} DPM-Solver++ steps, guidance {GUIDANCE:g}, float32, judged by the checker below.",
        'Plain: "a red ball on a blue background". Full: "a small red ball on the left on a blue background".',
        'Looks, in turn: "a striped red ball on ...", "a dotted ...", "an outline drawing of a red ball on ...".',
        "",
        "| attribute | plain | full | looks | chance |",
        "|---|---|---|---|---|",
    ]
    for name, count in CHANCES.items():
        cells = [percent(group[name]) if name in group else "" for group in groups]
        lines.append(f"| {name} | {' | '.join(cells)} | {percent(1 / count)} |")
    lines += [f"| all asked | {' | '.join(percent(group['all']) for group in groups)} | |", ""]
    lines += ["| object | plain | full | looks |", "|---|---|---|---|"]
    for thing in OBJECTS:
        lines.append(f"| {thing} | {' | '.join(percent(group[f'object: {thing}']) for group in groups)} |")
    return lines


PAIR_ROWS = {
    "layout": ("beside or above each other, as asked", 0.5),
    "objects": ("both objects there, wherever", None),
    "relation": ("both objects there, each in its place", None),
    "order, given both": ("the right one first, among pictures with both", 0.5),
    "everything": ("and all colours right", None),
}
"""Figure of `follow_pairs` -> what the card says, and chance where it is known."""


def _pairs(figures: Mapping[str, Any]) -> list[str]:
    found = figures["pair prompts"]
    lines = [
        "## Two objects",
        "",
        f'{figures["prompts"]} prompts such as "a red ball left of a blue box on a white background", the four',
        f"relations in turn, {figures['seeds']} sampling seed(s).",
        "",
        "| what | share | chance |",
        "|---|---|---|",
    ]
    for name, (text, chance) in PAIR_ROWS.items():
        if name in found:
            lines.append(f"| {text} | {percent(found[name])} | {percent(chance) if chance else ''} |")
    return lines


def _autoencoder(figures: Mapping[str, Any]) -> list[str]:
    lines = ["## Autoencoder", "", "Reconstruction of unseen pictures, PSNR in dB, mean over pictures:", ""]
    return lines + [f"* {kind}: {value:.2f} dB" for kind, value in figures["autoencoder"].items()]


def _checker(figures: Mapping[str, Any]) -> list[str]:
    report = figures.get("checker report")
    if not report:
        return ["## Checker", "", "Not validated in this build."]
    lines = [
        "## Checker",
        "",
        f"A small convolutional network, `finetune.demo.checker`. Accuracy on {report['n']} unseen pictures: "
        + ", ".join(f"{percent(share)} {kind.__name__.strip('_')}" for share, kind in KINDS)
        + ' (junk must be called "none"; a lookalike is an ordinary object in a subject\'s colours).',
        "",
        "| attribute | true pictures | autoencoder reconstructions |",
        "|---|---|---|",
    ]
    lines += [f"| {n} | {percent(report['true'][n])} | {percent(report['reconstructed'][n])} |" for n in NAMES]
    lines += ["", "| subject | recall | false alarms on ordinary objects in its colours |", "|---|---|---|"]
    for name, found in report.items():
        if isinstance(found, dict) and "recall" in found:
            lines.append(f"| {name} | {percent(found['recall'])} | {percent(found['false alarms'])} |")
    for attribute, table in report["confusions"].items():
        lines += ["", *_confusion(attribute, table)]
    return lines


def _confusion(attribute: str, table: list[list[int]]) -> list[str]:
    names = NAMES[attribute]
    lines = [f"Confusions on reconstructions, {attribute} (row: truth, column: answer):", ""]
    lines += ["| |" + "|".join(names) + "|", "|---|" + "---|" * len(names)]
    for name, row in zip(names, table, strict=True):
        lines.append(f"| {name} |" + "|".join(str(count) if count else "" for count in row) + "|")
    return lines


STAGES = ("autoencoder", "decoder", "denoiser", "details", "checker")


def _amounts(figures: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Training amounts",
        "",
        "| stage | pictures seen | steps | minutes (wall clock) |",
        "|---|---|---|---|",
    ]
    for stage in STAGES:
        found = figures["training"].get(stage)
        if found:
            lines.append(f"| {stage} | {found['samples']:,} | {found['step']:,} | {found['seconds'] / 60:.0f} |")
    seconds = figures["seconds per picture"]
    lines += ["", f"One 20-step picture takes {seconds:.2f} s of CPU (one thread, made alone; best of five)."]
    return lines


WEAK = """## Known weaknesses

* 64 x 64 pixels, one drawing per class: it shows whether a technique works, not how pictures of the world would look.
* Stripes, dots and outline drawings were a small share of the training and are hardly drawn (column "looks"): a prompt
  that asks for them gets a flat picture, or scribbles.
* Small objects lose their shape before they lose colour, size or place: compare the object columns above.
  Fine parts (whiskers, a robot's mouth) smear.
* Words outside the captions are untrained; a prompt without colour or background gets any, at times the same for both.
* The checker has errors of its own (above); differences of a few points between runs mean little.

## Licence and use

Made by this project from its own drawings, under the project's licence. For demos, tests and method comparisons.
"""


def write_card(figures: Mapping[str, Any], file: Path) -> None:
    """Write README.md for the pipeline folder from the figures of `measure` and the stages' progress."""
    head = HEAD.format(
        objects=len(OBJECTS), colours=len(COLOURS), megabytes=figures["megabytes"], object_names=", ".join(OBJECTS),
        colour_names=", ".join(COLOURS), sizes=", ".join(SIZES), positions=", ".join(POSITIONS),
    )  # fmt: skip
    parts = [head.rstrip().split("\n"), _following(figures), _pairs(figures), _autoencoder(figures), _checker(figures),
             _amounts(figures), WEAK.rstrip().split("\n")]  # fmt: skip
    file.write_text("\n\n".join("\n".join(part) for part in parts) + "\n", encoding="utf-8")
