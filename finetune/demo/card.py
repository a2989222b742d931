"""The model card, written from the measured figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.demo.checker import NAMES
from finetune.demo.measure import GUIDANCE, STEPS
from finetune.demo.world import COLOURS, OBJECTS, POSITIONS, SIZES

HEAD = """# The embedded base model

A real Stable Diffusion pipeline at toy size: it draws {objects} single objects in {colours} colours at 64 x 64 pixels
and follows its captions, so that fine-tuning can be shown and measured on a laptop without a network. Load it with
`StableDiffusionPipeline.from_pretrained(finetune.demo.BASE_DIR, safety_checker=None)`.

![samples](samples.png)

Rows of the sheet: "a ball", "a box", ...; prompts with a colour and a background; prompts with everything named.

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


def _following(figures: Mapping[str, Any]) -> list[str]:
    plain, full = figures["plain prompts"], figures["full prompts"]
    chance = {
        "object": len(OBJECTS),
        "colour": len(COLOURS),
        "background": len(COLOURS),
        "size": 3,
        "position": 5,
    }
    lines = [
        "## Prompt following",
        "",
        f"{figures['prompts']} prompts of either kind, {figures['seeds']} sampling seed(s), {STEPS} DPM-Solver++ "
        f"steps, guidance {GUIDANCE:g}, float32, judged by the checker below.",
        'Plain: "a red ball on a blue background". Full: "a small red ball on the left on a blue background".',
        "",
        "| attribute | plain | full | chance |",
        "|---|---|---|---|",
    ]
    for name, count in chance.items():
        first = percent(plain[name]) if name in plain else ""
        lines.append(f"| {name} | {first} | {percent(full[name])} | {percent(1 / count)} |")
    lines += [
        f"| all asked | {percent(plain['all'])} | {percent(full['all'])} | |",
        "",
        "| object | plain | full |",
    ]
    lines.append("|---|---|---|")
    for thing in OBJECTS:
        key = f"object: {thing}"
        lines.append(f"| {thing} | {percent(plain[key])} | {percent(full[key])} |")
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
        f"A small convolutional network, `finetune.demo.checker`. Accuracy on {report['n']} unseen pictures (the "
        'mix has 16 % junk that must be called "none", 10 % demo subjects, 10 % ordinary objects in subject colours):',
        "",
        "| attribute | true pictures | autoencoder reconstructions |",
        "|---|---|---|",
    ]
    lines += [f"| {n} | {percent(report['true'][n])} | {percent(report['reconstructed'][n])} |" for n in NAMES]
    lines += ["", "| subject | recall | false alarms on ordinary objects in its colours |", "|---|---|---|"]
    for name, found in report.items():
        if isinstance(found, dict) and "recall" in found:
            lines.append(f"| {name} | {percent(found['recall'])} | {percent(found['false alarms'])} |")
    names = NAMES["object"]
    lines += [
        "",
        "Confusions on reconstructions (row: truth, column: answer):",
        "",
        "| |" + "|".join(names) + "|",
    ]
    lines.append("|---|" + "---|" * len(names))
    for name, row in zip(names, report["confusion"], strict=True):
        lines.append(f"| {name} |" + "|".join(str(count) if count else "" for count in row) + "|")
    return lines


def _amounts(figures: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Training amounts",
        "",
        "| stage | pictures seen | steps | minutes (wall clock) |",
        "|---|---|---|---|",
    ]
    for stage in ("autoencoder", "decoder", "denoiser", "checker"):
        found = figures["training"].get(stage)
        if found:
            lines.append(f"| {stage} | {found['samples']:,} | {found['step']:,} | {found['seconds'] / 60:.0f} |")
    seconds = figures["seconds per picture"]
    lines += ["", f"One 20-step picture takes {seconds:.2f} s of CPU (one thread, pictures made one at a time)."]
    return lines


WEAK = """## Known weaknesses

* 64 x 64 pixels, one drawing per class: it shows whether a technique works, not how pictures of the world would look.
* Two-object scenes, textures and outline drawings were a small share of the training and are not measured here.
* Small objects lose their shape before they lose colour, size or place: compare the two object columns above.
  Straight sides come out bowed, fine parts (whiskers, a robot's mouth) smeared.
* Words outside the captions are untrained; a prompt without colour or background gets any, at times the same for both.
* The autoencoder blurs the demo subjects more than ordinary objects (dB above); the checker still knows them all.
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
    parts = [head.rstrip().split("\n"), _following(figures), _autoencoder(figures), _checker(figures),
             _amounts(figures), WEAK.rstrip().split("\n")]  # fmt: skip
    file.write_text("\n\n".join("\n".join(part) for part in parts) + "\n", encoding="utf-8")
