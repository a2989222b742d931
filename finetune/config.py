"""Run: the one frozen value that describes a training run. Every knob, its unit, its default and its check live here.

A `Run` comes from a recipe (a Python file with a `RUN`), from YAML or JSON, or from the `run.json` of an earlier run.
`finetune show` prints it with the meaning of each field. Reading and overriding is in `finetune.run_files`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A frozen group of fields; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The base model that the adapter is trained on."""

    base: str
    """A diffusers folder, a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5, or demo: the embedded base."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. None means its default branch."""
    variant: str | None = None
    """File variant inside the base, usually fp16. None means the plain files."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format of the frozen base; what is trained stays in fp32. auto: bf16 where the GPU computes in it, fp16
    on older GPUs, fp32 on a CPU."""


class PriorConfig(Section):
    """Prior preservation: pictures of the ordinary class keep the class from turning into the subject (DreamBooth)."""

    prompts: tuple[str, ...] = Field(min_length=1)
    """Captions of class pictures, without the trigger word, e.g. "a photo of a dog". Several are used in turn."""
    folder: Path | None = None
    """Folder of class pictures; missing ones are generated with the base model. None: class_images in output_dir."""
    images: int = Field(default=100, ge=1)
    """How many class pictures there should be. 10 to 20 per subject picture is usual."""
    prior_loss_weight: float = Field(default=1.0, ge=0)
    """Weight of a class picture's loss; a subject picture weighs 1."""
    inference_steps: int = Field(default=30, ge=1)
    """Denoising steps for each generated class picture."""
    guidance_scale: float = Field(default=7.5, ge=0)
    """Classifier-free guidance for generated class pictures; 1 turns it off."""
    batch_size: int = Field(default=4, ge=1)
    """Class pictures generated at once."""


class DataConfig(Section):
    """The pictures, their captions and how they are cut."""

    folder: Path
    """Folder of pictures; captions from .txt sidecars, metadata.jsonl, a template, or kohya `10_name` folders."""
    captions: Literal["auto", "metadata", "sidecar", "kohya", "template", "filename"] = "auto"
    """Where captions come from. auto: metadata.jsonl, else sidecars, else kohya folder names, else the template."""
    caption_template: str | None = None
    """Caption for pictures that have none, e.g. "a photo of sks dog"."""
    trigger: str | None = None
    """The word that calls the subject, e.g. sks. Must stand in every caption; travels in the exported file."""
    resolution: int | None = Field(default=None, ge=16, le=4096)
    """Side of a square training picture, in pixels; other shapes get the same area. None: the family's own."""
    upscale: bool = False
    """Enlarge pictures smaller than their bucket. Off: they get a smaller bucket instead."""
    flip: bool = False
    """Mirror every other draw of a picture, left to right. Not for faces or text."""
    repeats: int = Field(default=1, ge=1)
    """How often each subject picture is seen per epoch, on top of a kohya folder's own count."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of draws that see an empty caption, which keeps guidance working in long runs. 0.05 to 0.1 is usual."""
    background: str = Field(default="#ffffff", pattern=r"^#[0-9a-fA-F]{6}$")
    """Colour put behind transparent pixels, as #rrggbb."""
    cache_folder: Path | None = None
    """Where encoded pictures and captions are kept. None: cache in output_dir. Safe to share between runs."""
    prior: PriorConfig | None = None
    """Prior preservation with class pictures. None turns it off."""


class AdapterConfig(Section):
    """What is trained, and how large it is."""

    method: Literal["lora"] = "lora"
    """The kind of adapter."""
    rank: int = Field(default=16, ge=1, le=1024)
    """Width of the low-rank update; file size and memory grow linearly with it. 4 to 128 is usual."""
    alpha: float | None = Field(default=None, gt=0)
    """Strength: the update is scaled by alpha / rank. None means alpha = rank, a scale of 1."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of adapter inputs zeroed in training."""
    targets: str = "attention"
    """Layers that get an adapter: a preset (attention, attention+mlp, all) or a regular expression over names."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of this adapter. None means optimizer.learning_rate."""


class ObjectiveConfig(Section):
    """What the denoiser is asked: the prediction, the noise levels and how errors are weighed."""

    prediction: Literal["epsilon", "v_prediction", "sample", "flow"] | None = None
    """What the denoiser predicts. None: what the checkpoint's scheduler says, which is nearly always right."""
    density: Literal["uniform", "logit_normal", "mode", "cosmap"] = "uniform"
    """How often each noise level is trained."""
    density_mean: float = 0.0
    """Centre of logit_normal; positive favours noisy levels."""
    density_std: float = Field(default=1.0, gt=0)
    """Width of logit_normal."""
    density_scale: float = 1.29
    """Shape of mode; positive favours the middle. SD3's paper uses 1.29."""
    weighting: Literal["none", "min_snr", "sigma_sqrt", "cosmap"] = "none"
    """How noise levels are weighed against each other; sigma_sqrt and cosmap are for flow models."""
    snr_gamma: float = Field(default=5.0, gt=0)
    """The cap of min_snr; the paper uses 5."""
    loss: Literal["mse", "l1", "huber", "smooth_l1"] = "mse"
    """How an error is measured."""
    huber_delta: float = Field(default=0.1, gt=0)
    """Where huber and smooth_l1 turn from squared to linear, in units of the prediction."""


class OptimizerConfig(Section):
    """How the trained parameters move."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw8bit"
    """adamw8bit keeps its state in a quarter of the memory (bitsandbytes); adamw is torch's own."""
    learning_rate: float = Field(default=1e-4, gt=0, lt=1)
    """Step size after warm-up. LoRA: 5e-5 to 5e-4."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay, per step and unit of learning rate."""
    eps: float = Field(default=1e-8, gt=0)
    """Keeps the division by the gradient's size finite."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """The learning rate after warm-up, as a function of the step alone."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises from zero."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients longer than this, over all parameters together, are scaled down to it."""


class TrainConfig(Section):
    """How long and in what portions."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(default=1, ge=1)
    """Pictures per process and forward pass, class pictures included."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer step; every picture of a step counts the same."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: much less memory, about a third more time."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep a running mean of the trained parameters and export that. 0.99 to 0.9999; None turns it off."""
    seed: int = Field(default=0, ge=0)
    """Every draw of the run follows from it."""
    log_every: int = Field(default=10, ge=1)
    """Optimizer steps between two lines in metrics.jsonl."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl."""


class ValidationConfig(Section):
    """A loss that can be compared: fixed pictures, fixed noise, fixed noise levels, as a ratio to the base model."""

    every: int = Field(default=100, ge=0)
    """Optimizer steps between validations; 0 turns validation off."""
    holdout: int = Field(default=0, ge=0)
    """Subject pictures set aside and never trained on. 0: a fixed probe of the training pictures."""
    quantiles: int = Field(default=8, ge=1)
    """Noise levels per picture, spread evenly over the range."""


class SamplesConfig(Section):
    """Pictures rendered from fixed prompts and seeds, before the first step and after the last."""

    prompts: tuple[str, ...] = ()
    """What to render; empty turns samples off."""
    per_prompt: int = Field(default=2, ge=1)
    """Pictures per prompt; the seeds are 0, 1, 2, ... and the same before and after."""
    every: int = Field(default=0, ge=0)
    """Optimizer steps between two sheets in between; 0: only before and after."""
    inference_steps: int = Field(default=25, ge=1)
    """Denoising steps per picture."""
    guidance_scale: float = Field(default=7.5, ge=0)
    """Classifier-free guidance; 1 turns it off."""
    negative_prompt: str = ""
    """What to steer away from."""


class CheckpointConfig(Section):
    """How much work a crash may cost."""

    every: int = Field(default=100, ge=1)
    """Optimizer steps between checkpoints; the last step always gets one."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay. An old one goes only after the new one is safe on disk."""


class ExportConfig(Section):
    """Which files a finished run becomes."""

    formats: tuple[Literal["diffusers", "kohya", "peft", "merged"], ...] = ("diffusers", "kohya")
    """diffusers and peft for Python; kohya for ComfyUI, A1111, Forge and InvokeAI; merged: a whole pipeline folder."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    """Number format of the exported tensors."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """File name of the kohya file, without ending; also the title readers show. None: the name of output_dir."""


class Run(Section):
    """One training run, from pictures to adapter."""

    model: ModelConfig
    data: DataConfig
    adapter: AdapterConfig = AdapterConfig()
    text_encoder_adapter: AdapterConfig | None = None
    """Adapter of the text encoders. None: they stay frozen and captions are encoded once."""
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()
    samples: SamplesConfig = SamplesConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    output_dir: Path
    """Folder of this run: checkpoints, metrics, samples, cache, exports. Running again goes on where it stopped."""

    @model_validator(mode="after")
    def _consistent(self) -> Run:
        problems = contradictions(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def export_name(self) -> str:
        """What the exported adapter is called."""
        folder = re.sub(r"[^A-Za-z0-9_-]+", "-", self.output_dir.resolve().name).strip("-_")
        return self.export.name or folder or "adapter"

    def digest(self) -> str:
        """SHA-256 over everything that decides the result (not where it is written, nor how often it is logged)."""
        decisive = {key: value for key, value in flatten(self).items() if not is_free(key)}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


FREE_TO_CHANGE = (
    "output_dir", "checkpoint.", "samples.", "export.", "validation.every", "train.log_every", "train.trackers",
    "data.cache_folder", "data.prior.batch_size", "data.folder", "data.prior.folder", "model.base", "model.revision",
    "model.variant",
)  # fmt: skip
"""Fields that a resumed run may change: they do not touch the trained weights. Folders and the base's name are among
them, because the content itself is compared: every picture's digest and the digest of the base's weights."""


def is_free(key: str) -> bool:
    """Whether a dotted field may change between the two halves of a resumed run."""
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE_TO_CHANGE)


def flatten(run: BaseModel) -> dict[str, Any]:
    """Dotted field names and their JSON values, e.g. {"adapter.rank": 16}; a section that is off is one None."""

    def walk(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {k: v for name, inner in value.items() for k, v in walk(f"{prefix}.{name}", inner).items()}

    document = run.model_dump(mode="json")
    return {key: value for name, inner in document.items() for key, value in walk(name, inner).items()}


def differences(old: Run, new: Run) -> list[str]:
    """What would change the training if a run made with `old` went on with `new`, one line per field."""
    before, after = flatten(old), flatten(new)
    changed = [k for k in sorted(before.keys() | after.keys()) if before.get(k) != after.get(k) and not is_free(k)]
    if old.optimizer.schedule == "constant" and "train.steps" in changed:
        changed.remove("train.steps")
    return [f"{key} was {before.get(key)!r} and is now {after.get(key)!r}" for key in changed]


def has_word(text: str, word: str) -> bool:
    """Whether a word or phrase stands in a text as such: sks in "a sks, running", but not in "desks"."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def contradictions(run: Run) -> list[str]:
    """Combinations of fields that cannot work together, each with the way out."""
    problems = []
    if run.optimizer.warmup_steps >= run.train.steps:
        problems.append(
            f"optimizer.warmup_steps={run.optimizer.warmup_steps} is not below train.steps={run.train.steps}, so the "
            "learning rate would never reach its value; lower warmup_steps or raise steps"
        )
    if run.data.captions == "template" and not run.data.caption_template:
        problems.append("data.captions=template needs data.caption_template, e.g. \"a photo of sks dog\"")
    trigger, template = run.data.trigger, run.data.caption_template
    if trigger and template and not has_word(template, trigger):
        problems.append(
            f"data.trigger={trigger!r} does not stand in data.caption_template={template!r}, so the trigger would not "
            "be learned; put it into the template or drop data.trigger"
        )
    if run.data.prior and trigger:
        problems += [
            f"data.prior.prompts has {prompt!r}, which contains the trigger {trigger!r}: class pictures would teach "
            "the ordinary class under the subject's name; take the trigger out of the class prompt"
            for prompt in run.data.prior.prompts
            if has_word(prompt, trigger)
        ]
    if run.export.name and (run.export.name == "pytorch_lora_weights" or run.export.name.endswith(".")):
        problems.append(
            f"export.name={run.export.name} is the name of the diffusers file or ends in a dot; choose another, it "
            "becomes the file for ComfyUI and A1111"
        )
    for beta in run.optimizer.betas:
        if not 0 <= beta < 1:
            problems.append(f"optimizer.betas holds {beta}, but both must lie in [0, 1); 0.9,0.999 is usual")
    return problems
