"""What sampling starts from besides text: a picture to change, a mask of what to repaint, a control picture."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn

from finetune.errors import ConfigError
from finetune.families.base import Components, ModelFamily
from finetune.families.controlnets import controlnet_problems
from finetune.sampling.edges import PREPARATIONS
from finetune.sampling.keeping import Keeping, keeping
from finetune.sampling.wanted import STRENGTH, steering_problems


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
        shown: whether the denoiser itself is shown picture and mask, as an inpainting one is; `for_base` says so.
    """

    image: Image.Image | None = None
    strength: float = STRENGTH
    mask: Image.Image | None = None
    control: Image.Image | None = None
    control_from: str | None = None
    controlnet: nn.Module | None = None
    control_scale: float = 1.0
    shown: bool = False

    @property
    def starts_from_image(self) -> bool:
        """Whether the pipeline is given `image`; what a mask has repainted wholly starts from noise alone."""
        return self.image is not None and (self.shown or self.mask is None or self.strength < 1)

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
        return replace(guides, image=Image.new("RGB", (1, 1), "grey"), mask=white, strength=1.0, shown=True)
    return replace(guides, mask=guides.mask or white, shown=True)


def steered(pipeline: Any, guides: Guides) -> Any:
    """The public pipeline for these guides, around the same networks.

    Raises:
        ConfigError: if diffusers has none for this family, or the ControlNet was made for another.
    """
    kinds: list[Any] = []
    if guides.shown:
        kinds = [diffusers.AutoPipelineForInpainting]
    elif guides.starts_from_image:
        kinds = [diffusers.AutoPipelineForImage2Image]
    if guides.controlnet is not None and not guides.shown:
        # keep: SD3 has no pipeline for a picture and a ControlNet; see `begun`.
        kinds.append(diffusers.AutoPipelineForText2Image)
    if not kinds:
        return pipeline
    extra = {}
    if guides.controlnet is not None:
        denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
        own = {**cast(Any, guides.controlnet).config, "_class_name": type(guides.controlnet).__name__}
        if problems := controlnet_problems(own, denoiser.config, pipeline.vae.config):
            raise ConfigError("The ControlNet cannot be used:", problems)
        extra = {"controlnet": guides.controlnet}
    for kind in kinds:
        try:
            return _same_parts(kind.from_pipe(pipeline, **extra), pipeline)
        except ValueError as error:
            reason = str(error).splitlines()[0]
    raise ConfigError(f"diffusers has no pipeline that steers {type(pipeline).__name__} so: {reason}")


def _same_parts(steered: Any, pipeline: Any) -> Any:
    steered.scheduler = pipeline.scheduler
    steered.vae = SteadyVae(pipeline.vae)
    steered.set_progress_bar_config(disable=True)
    return steered


class SteadyVae:
    """An autoencoder as pipelines may use it: it stays where and as it is, and answers without drawing noise.

    The pipelines would feed it the prompt's number format, cast it for good, or draw from the global generator.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def to(self, *_: Any, **__: Any) -> SteadyVae:
        """Stays as it is."""
        return self

    def encode(self, pixels: Tensor) -> Any:
        """The means of what it would give, computed in its own number format."""
        home = next(self._vae.parameters())
        # keep: under a half-precision denoiser's autocast an autoencoder in fp32 would overflow in fp16.
        with torch.autocast(home.device.type, enabled=False):
            mean = self._vae.encode(pixels.to(home.device, home.dtype)).latent_dist.mean
        return _Encoded(_Sure(mean.to(pixels.device, pixels.dtype)))


@dataclass(frozen=True)
class _Encoded:
    latent_dist: _Sure


@dataclass(frozen=True)
class _Sure:
    """A distribution that always gives its mean."""

    mean: Tensor

    def sample(self, generator: Any = None) -> Tensor:
        return self.mean

    def mode(self) -> Tensor:
        return self.mean


def pictures_for(guides: Guides, pipeline: Any, size: tuple[int, int], count: int) -> dict[str, Any]:
    """Arguments of the pipeline's call for a batch of `count` pictures of `size` (height, width) in pixels."""
    accepted = inspect.signature(pipeline.__call__).parameters
    told: dict[str, Any] = {"height": size[0], "width": size[1]} if "height" in accepted else {}
    if guides.starts_from_image and "strength" in accepted:
        assert guides.image is not None, "it starts from it"
        pixels = (_pixels(guides.image, size) + 1) / 2
        told |= {"image": pixels.expand(count, -1, -1, -1), "strength": guides.strength}
    if guides.shown and guides.mask is not None:
        told["mask_image"] = [guides.mask.convert("L").resize(size[::-1], Image.Resampling.LANCZOS)] * count
    if guides.control is not None:
        shown = guides.control.convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS)
        if guides.control_from is not None:
            shown = PREPARATIONS[guides.control_from](shown)
        # keep: where nothing else is called image, the oldest pipelines call the control picture so.
        told["control_image" if "control_image" in accepted else "image"] = [shown] * count
        told["controlnet_conditioning_scale"] = guides.control_scale
    return told


def begun(
    guides: Guides, family: ModelFamily, components: Components, pipeline: Any, size: tuple[int, int],
    generators: Sequence[torch.Generator], dtype: torch.dtype, steps: int,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of the call of a pipeline that knows no picture to change: the picture under the noise of the step that
    its strength begins at, and the noise levels from there on. Nothing for all other pipelines.

    Args:
        size, generators, dtype: see `kept`; the generators give the noise.

    Raises:
        ConfigError: for a sampler that cannot begin within its schedule.
    """
    if not guides.starts_from_image or "strength" in (accepted := inspect.signature(pipeline.__call__).parameters):
        return {}
    assert guides.image is not None, "it starts from it"
    scheduler = pipeline.scheduler
    if "sigmas" not in accepted or "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ConfigError(
            f"{type(scheduler).__name__} cannot begin within its schedule, as strength={guides.strength:g} under a "
            "ControlNet asks; choose scheduler=flow_euler or strength=1."
        )
    scheduler.set_timesteps(steps)
    levels = scheduler.sigmas[int(steps - min(steps * guides.strength, steps)) : -1].tolist()
    picture = _latents(family, components, _pixels(guides.image, size)).to("cpu")
    noise = [torch.randn(picture.shape, generator=generator, dtype=dtype) for generator in generators]
    latents = levels[0] * torch.cat(noise) + (1 - levels[0]) * picture
    # keep: the scheduler shifts the levels that it is given, and these are shifted already.
    sigmas = [level / (scheduler.shift - (scheduler.shift - 1) * level) for level in levels]
    return {"latents": latents.to(dtype), "sigmas": sigmas}


def kept(
    guides: Guides, family: ModelFamily, components: Components, size: tuple[int, int],
    generators: Sequence[torch.Generator], dtype: torch.dtype,
) -> Keeping | None:  # fmt: skip
    """What the mask keeps of the picture while a batch of `size` (height, width) in pixels is drawn; None: nothing.

    Args:
        generators, dtype: see `keeping`.
    """
    if guides.shown or guides.mask is None or guides.image is None:
        return None
    mask = (_pixels(guides.mask, size)[:, :1] + 1) / 2
    return keeping(family, _latents(family, components, _pixels(guides.image, size)), mask, generators, dtype)


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
