"""Which family a single file is of, from its header alone; no weight is read and torch is not needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from finetune.errors import ConfigError
from finetune.header import Header, read_header

PREFIX = "model.diffusion_model."
"""What the denoiser's names begin with, in files that hold more than the denoiser."""
UNET_INPUT, UNET_OUTPUT = "input_blocks.0.0.weight", "out.2.weight"
OTHER_INPUTS = {7: "an upscaling model", 8: "an instruct-pix2pix model", 5: "a depth model"}
"""Inputs of a UNet that answers four channels -> what it is shown besides the noisy latents."""
FOREIGN = {
    "distilled_guidance_layer.in_proj.bias": "Chroma",
    "single_stream_modulation.lin.weight": "Flux.2",
    "control_model.time_embed.0.weight": "a ControlNet",
    "input_hint_block.0.weight": "a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "controlnet_x_embedder.weight": "a ControlNet",
    "edm_mean": "Playground 2.5, which is noised as EDM",
    "edm_vpred.sigma_max": "an EDM-style model such as CosXL",
    "patchify_proj.weight": "LTX-Video",
    "cap_embedder.0.weight": "Lumina 2 or Z-Image",
}
"""A tensor that only this kind of model has -> the kind, none of which can be trained here."""
SHAPES = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl_refiner"}
"""Width of the text that a UNet reads -> family."""


@dataclass(frozen=True)
class Detection:
    """What a file is, and how that was seen.

    Attributes:
        family: name in FAMILIES.
        skeleton: the shipped configuration that fits.
        prediction: "epsilon", "v_prediction" or "flow"; None when the file does not say.
        zero_terminal_snr: whether the last timestep is pure noise; None when the file does not say.
        reasons: what gave it away, one text each.
        inputs: channels that an inpainting UNet reads; None: as the skeleton says.
    """

    family: str
    skeleton: str
    prediction: str | None
    zero_terminal_snr: bool | None
    reasons: tuple[str, ...] = field(default=())
    inputs: int | None = None


def detect_family(path: Path) -> Detection:
    """Say what a single-file checkpoint is.

    Raises:
        ConfigError: if it is no whole base model of a family here, saying what it is instead.
        CheckpointError: if it is no sound safetensors file.
    """
    return detect(read_header(path))


def detect(header: Header) -> Detection:
    """The same from a header that was read already."""
    names = header.tensors.keys()
    denoiser = {name.removeprefix(PREFIX) for name in names}
    for mark, kind in FOREIGN.items():
        if mark in denoiser:
            raise ConfigError(f"{header.path.name} is {kind} (it has {mark}), which no family here can train.")
    for looks in (_flux, _mmdit, _unet):
        found = looks(header, denoiser)
        if found is not None:
            return found
    raise ConfigError(f"{header.path.name} is no base model that is known here: {otherwise(header)}.")


def _flux(header: Header, denoiser: set[str]) -> Detection | None:
    if "double_blocks.0.img_attn.norm.key_norm.scale" not in denoiser:
        return None
    shape = header.shape(PREFIX + "img_in.weight") or header.shape("img_in.weight")
    latents = _width(header, "final_layer.linear.weight", 0)
    if shape and latents and shape[1] != latents:
        raise ConfigError(
            f"{header.path.name} is a Flux that reads {shape[1]} numbers per token and answers {latents}: Fill, Depth, "
            "Canny or Kontext. Only text-to-image Flux can be trained here; use flux1-dev."
        )
    told = "guidance_in.in_layer.weight" in denoiser
    reasons = ["double_blocks.* with img_attn: the transformer of Flux.1"]
    reasons.append("guidance_in.*: told a guidance strength, as dev" if told else "no guidance_in.*: schnell")
    return Detection("flux", "flux-dev" if told else "flux-schnell", "flow", None, tuple(reasons))


def _mmdit(header: Header, denoiser: set[str]) -> Detection | None:
    if "joint_blocks.0.context_block.adaLN_modulation.1.bias" not in denoiser:
        return None
    depth = 1 + max(int(name.split(".")[1]) for name in denoiser if name.startswith("joint_blocks."))
    dual = any(".x_block.attn2." in name for name in denoiser)
    reasons = [f"joint_blocks.0 to {depth - 1}: the transformer of Stable Diffusion 3"]
    if dual:
        reasons.append("x_block.attn2.*: a second attention, as in 3.5 medium")
        return Detection("sd3", "sd3.5-medium", "flow", None, tuple(reasons))
    normed = "joint_blocks.0.x_block.attn.ln_q.weight" in denoiser
    if normed:
        reasons.append("x_block.attn.ln_q: normed queries, as in 3.5 large")
    return Detection("sd3", "sd3.5-large" if normed else "sd3-medium", "flow", None, tuple(reasons))


def _unet(header: Header, denoiser: set[str]) -> Detection | None:
    if UNET_INPUT not in denoiser:
        return None
    inputs, latents = _width(header, UNET_INPUT, 1), _width(header, UNET_OUTPUT, 0) or 4
    repaints = inputs == 2 * latents + 1
    if inputs != latents and not repaints:
        raise ConfigError(f"{header.path.name} {other_inputs(inputs, latents)}")
    family, reasons = _unet_family(header, denoiser)
    reasons += [f"its UNet reads {inputs} channels and answers {latents}: an inpainting model"] if repaints else []
    prediction, terminal, said = _prediction(header)
    reasons += said
    skeletons = {"sd2": "sd2-768" if prediction == "v_prediction" else "sd2-base", "sdxl_refiner": "sdxl-refiner"}
    skeleton = skeletons.get(family, family)
    return Detection(family, skeleton, prediction, terminal, tuple(reasons), inputs if repaints else None)


def other_inputs(inputs: int | None, latents: int) -> str:
    """Why a UNet that is shown something else besides the noisy latents cannot be trained."""
    return (
        f"is {OTHER_INPUTS.get(inputs or 0, 'no text-to-image model')}: its UNet reads {inputs} channels and answers "
        f"{latents}. Training it needs another picture for every picture, which is not offered; train on the "
        "text-to-image base and use the adapter there."
    )


def _unet_family(header: Header, denoiser: set[str]) -> tuple[str, list[str]]:
    """By the text encoders' names; where there are none, by the width of the text that the UNet reads."""
    marks = {
        "cond_stage_model.transformer.": "sd1",
        "cond_stage_model.model.": "sd2",
        "conditioner.embedders.1.model.": "sdxl",
        "conditioner.embedders.0.model.": "sdxl_refiner",
    }
    for prefix, family in marks.items():
        if any(name.startswith(prefix) for name in header.tensors):
            return family, [f"{prefix}*: the text encoder of {family}"]
    read = next((name for name in sorted(denoiser) if name.endswith(".attn2.to_k.weight")), None)
    width = _width(header, read, 1) if read else None
    if width not in SHAPES:
        raise ConfigError(
            f"{header.path.name} has a UNet but no text encoder, and its UNet reads text of width {width}, which "
            f"belongs to none of {', '.join(SHAPES.values())}; name a whole checkpoint."
        )
    return SHAPES[width], [f"no text encoder; the UNet reads text of width {width}, as {SHAPES[width]}"]


def _prediction(header: Header) -> tuple[str | None, bool | None, list[str]]:
    """What the file says of its own prediction; the marks must agree.

    Sources: ComfyUI's `v_pred` and `ztsnr` tensors; Stability-AI/ModelSpec 1.0.1 `modelspec.prediction_type` and
        `modelspec.architecture`.
    """
    said: dict[str, str] = {}
    if "v_pred" in header.tensors:
        said["the tensor v_pred"] = "v_prediction"
    spec = header.metadata.get("modelspec.prediction_type", "").lower()
    if spec in {"epsilon", "v", "v_prediction"}:
        said["modelspec.prediction_type"] = "epsilon" if spec == "epsilon" else "v_prediction"
    architecture = header.metadata.get("modelspec.architecture", "")
    for ending, means in (("v2-768-v", "v_prediction"), ("v2-512", "epsilon")):
        if architecture.partition("/")[0].endswith(ending):
            said["modelspec.architecture"] = means
    if len(set(said.values())) > 1:
        lines = [f"{where} says {what}" for where, what in said.items()]
        raise ConfigError(
            f"{header.path.name} contradicts itself about what it predicts, and a wrong guess ruins the training; find "
            "out from its author and correct the file:",
            lines,
        )
    terminal = True if "ztsnr" in header.tensors else None
    reasons = [f"{where}: {what}" for where, what in said.items()]
    reasons += ["the tensor ztsnr: zero terminal SNR"] if terminal else []
    return next(iter(said.values()), None), terminal, reasons


def otherwise(header: Header) -> str:
    """What a file that is no base model looks like, and what to do with it."""
    return next(_guesses(header.tensors.keys()), "its names follow no layout known here; name a whole checkpoint")


def _guesses(names: Iterable[str]) -> Iterator[str]:
    text = "\n".join(names)
    if any(mark in text for mark in (".lora_down.", ".lora_A.", ".lora.down", "hada_w1", "lokr_w1", ".lora_up.")):
        yield "it is an adapter (LoRA or the like), to be used on a base; name the base as model.base"
    if "decoder.up.0.block.0.conv1.weight" in text or "decoder.up_blocks.0.resnets.0.conv1.weight" in text:
        yield "it is an autoencoder; name it as model.vae"
    if "down_blocks.0.resnets.0.conv1.weight" in text or "transformer_blocks.0.attn.to_q.weight" in text:
        yield "it is one part of a diffusers folder; name the folder that holds model_index.json"
    if "text_model.encoder.layers.0" in text or "encoder.block.0.layer.0" in text:
        yield "it is a text encoder; name it under model.text_encoders"


def _width(header: Header, name: str, dimension: int) -> int | None:
    shape = header.shape(PREFIX + name) or header.shape(name)
    return shape[dimension] if shape and len(shape) > dimension else None
