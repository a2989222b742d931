"""What sampling starts from besides text: a picture to change, a mask of what to repaint, a control picture."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn

from finetune.errors import ConfigError
from finetune.families.base import Components, ModelFamily
from finetune.sampling.edges import PREPARATIONS

LDM_CHANNELS, FLOW_CHANNELS = 4, 16
"""Channels of published autoencoders; diffusers knows latents by these numbers."""


STRENGTH = 0.6
"""Usual share of the noise schedule for changing a picture."""


@dataclass(frozen=True)
class Guides:
    """Pictures that steer sampling; all are resized to the size that is asked for.

    Attributes:
        image: the picture to change (image-to-image); None starts from noise alone.
        strength: share of the noise schedule that is run on `image`, in (0, 1]; 1 forgets the picture.
        mask: white is repainted, black is kept; needs `image`.
        control: what `controlnet` is shown, e.g. an edge picture.
        control_from: what makes it of `control` first, a name in PREPARATIONS; None shows it as it is.
        controlnet: a diffusers ControlNet made for the base's family.
        control_scale: how strongly the control picture is followed; 1 is as trained.
    """

    image: Image.Image | None = None
    strength: float = STRENGTH
    mask: Image.Image | None = None
    control: Image.Image | None = None
    control_from: str | None = None
    controlnet: nn.Module | None = None
    control_scale: float = 1.0

    def problems(self) -> list[str]:
        """What contradicts itself."""
        return steering_problems(
            {
                "image": self.image is not None,
                "mask": self.mask is not None,
                "control": self.control is not None,
                "controlnet": self.controlnet is not None,
            },
            self.strength,
        )

    def steps(self, steps: int) -> int:
        """Denoising steps that are run of `steps`."""
        return steps if self.image is None else max(1, min(steps, int(steps * self.strength)))


def for_base(guides: Guides, family: ModelFamily, components: Components) -> Guides:
    """The guides that this very base needs: for an inpainting one a mask always.

    Without one everything is repainted, of an empty picture if there is none, which is text-to-image.
    """
    if not family.repaints(cast(Any, components.denoiser).config):
        return guides
    white = Image.new("L", (1, 1), 255)
    if guides.image is None:
        return replace(guides, image=Image.new("RGB", (1, 1), "grey"), mask=white, strength=1.0)
    return replace(guides, mask=guides.mask or white)


def steering_problems(given: Mapping[str, bool], strength: float) -> list[str]:
    """What contradicts itself in a choice of guides.

    Args:
        given: "image", "mask", "control", "controlnet" -> whether there is one.
        strength: see `Guides`.
    """
    found = []
    if given["mask"] and not given["image"]:
        found.append("a mask says what to repaint, so a picture to repaint is needed with it (image).")
    if given["image"] and not 0 < strength <= 1:
        found.append(f"strength={strength} must be above 0 and at most 1; 0.5 to 0.8 is usual.")
    if given["control"] != given["controlnet"]:
        found.append("a control picture and a ControlNet belong together; give both or neither.")
    if given["control"] and given["mask"]:
        found.append("a control picture and a mask cannot be combined, and inpainting bases always have a mask.")
    return found


def steered(pipeline: Any, guides: Guides) -> Any:
    """The public pipeline for these guides, around the same networks.

    Raises:
        ConfigError: if diffusers has none for this family, or the ControlNet was made for another.
    """
    kind: Any = None
    if guides.mask is not None:
        kind = diffusers.AutoPipelineForInpainting
    elif guides.image is not None:
        kind = diffusers.AutoPipelineForImage2Image
    elif guides.controlnet is not None:
        kind = diffusers.AutoPipelineForText2Image
    if kind is None:
        return pipeline
    extra = {}
    if guides.controlnet is not None:
        _check_controlnet(guides.controlnet, pipeline)
        extra = {"controlnet": guides.controlnet}
    try:
        return _same_scheduler(kind.from_pipe(pipeline, **extra), pipeline)
    except ValueError as error:
        raise ConfigError(
            f"diffusers has no pipeline that steers {type(pipeline).__name__} so: {str(error).splitlines()[0]}"
        ) from None


def _check_controlnet(controlnet: Any, pipeline: Any) -> None:
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    for width in ("cross_attention_dim", "joint_attention_dim", "pooled_projection_dim"):
        own, wanted = (getattr(network.config, width, None) for network in (controlnet, denoiser))
        if own != wanted:
            raise ConfigError(
                f"The ControlNet is made for another kind of base: its {width} is {own}, the base's {wanted}; take one "
                "that was trained on this base's family."
            )


def _same_scheduler(steered: Any, pipeline: Any) -> Any:
    steered.scheduler = pipeline.scheduler
    steered.set_progress_bar_config(disable=True)
    return steered


def pictures_for(
    guides: Guides, family: ModelFamily, components: Components, pipeline: Any, size: tuple[int, int], count: int
) -> dict[str, Any]:
    """Arguments of the pipeline's call for a batch of `count` pictures of `size` (height, width) in pixels."""
    accepted = inspect.signature(pipeline.__call__).parameters
    told: dict[str, Any] = {"height": size[0], "width": size[1]} if "height" in accepted else {}
    if guides.image is not None:
        told |= _to_change(guides, family, components, pipeline, size, count)
    if guides.control is not None:
        shown = guides.control.convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS)
        if guides.control_from is not None:
            shown = PREPARATIONS[guides.control_from](shown)
        # keep: where nothing else is called image, the oldest pipelines call the control picture so.
        told["control_image" if "control_image" in accepted else "image"] = [shown] * count
        told["controlnet_conditioning_scale"] = guides.control_scale
    return told


def takes_latents(guides: Guides, components: Components) -> bool:
    """Whether the pipeline can tell latents from a picture by their channels, so that the picture is encoded here.

    The autoencoder stays in fp32 while the pipeline would feed it the prompt's number format.
    """
    alone = guides.mask is None and guides.controlnet is None
    channels = int(cast(Any, components.vae).config.latent_channels)
    return channels in (LDM_CHANNELS, *((FLOW_CHANNELS,) if alone else ()))


def _to_change(
    guides: Guides, family: ModelFamily, components: Components, pipeline: Any, size: tuple[int, int], count: int
) -> dict[str, Any]:
    """The picture to change, its mask, and how much to change."""
    assert guides.image is not None, "called only with a picture"
    pixels = _pixels(guides.image, size)
    told: dict[str, Any] = {"strength": guides.strength, "image": ((pixels + 1) / 2).expand(count, -1, -1, -1)}
    encoded = takes_latents(guides, components)
    if encoded:
        channels = int(cast(Any, components.vae).config.latent_channels)
        pipeline.image_processor.register_to_config(vae_latent_channels=channels)
        told["image"] = _latents(family, components, pixels).expand(count, -1, -1, -1)
    if guides.mask is not None:
        grey = guides.mask.convert("L").resize(size[::-1], Image.Resampling.LANCZOS)
        told["mask_image"] = [grey] * count
        if encoded:
            kept = _pixels(Image.merge("RGB", [grey] * 3), size) < 0
            told["masked_image_latents"] = _latents(family, components, pixels * kept).expand(count, -1, -1, -1)
    return told


def _pixels(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """(1, 3, height, width) in [-1, 1]."""
    height, width = size
    resized = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    levels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).reshape(height, width, 3)
    return levels.permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.no_grad()
def _latents(family: ModelFamily, components: Components, pixels: Tensor) -> Tensor:
    assert components.vae is not None, "checked with the sizes"
    home = next(components.vae.parameters())
    with torch.autocast(home.device.type, enabled=False):
        mean = family.encode_images(components.vae, pixels.to(home.device, home.dtype)).mean
    return mean.to(family.device_of(components.denoiser))
