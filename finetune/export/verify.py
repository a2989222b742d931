"""Nothing is exported until it was read back: figures that compare a written file with the live adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from data_tools.errors import counted
from finetune.dtypes import ROUNDING
from finetune.errors import first_few
from finetune.export.changes import Deltas, deltas
from finetune.export.errors import ExportError
from finetune.export.job import Job, Outcome
from finetune.export.readers import READERS, Reading
from finetune.export.streaming import differing
from finetune.export.upcast import computing_in_fp32
from finetune.families.base import Components, ModelFamily, SizeConditioning
from finetune.rng import rng
from finetune.sampling.apply import adapter_applied, evaluating

NEGLIGIBLE = 1e-4
"""A module that changes less than this share of what the most changed one does counts as that: half precision has no
finer numbers."""
COMPUTE_LIMIT = 1e-5
"""How far two orders of a sum may differ in fp32, over the largest output."""
AMPLIFICATION = 5.0
"""A relative change of half-precision weights may change outputs this much more."""
LARGEST_SIDE = 8
"""Latents used for the comparison are at most this wide and high."""
PROMPTS = ("a photo", "a red house by the sea, painted in oil")


@dataclass(frozen=True)
class Verification:
    """How one reader's understanding of a file compares with the live adapter.

    Attributes:
        reader: name in READERS.
        modules: layers the reader changed; equal to the adapter's.
        weights_max_abs: largest difference of one element of a module's change.
        weights_relative: largest relative difference of a module's change (Frobenius norms).
        worst_module: where that is.
        outputs_max_abs: largest difference of one element of the text encoders' and the denoiser's outputs.
        outputs_relative: largest difference over the largest output, of the worst output.
        effect: largest change that the adapter makes, over the largest output; what a lost adapter would
            differ by.
        outputs_limit: what `outputs_relative` was held against.
    """

    reader: str
    modules: int
    weights_max_abs: float
    weights_relative: float
    worst_module: str
    outputs_max_abs: float
    outputs_relative: float
    effect: float
    outputs_limit: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """The truth a file is held against: the live base without and with the adapter.

    Attributes:
        words: what the live model says to prompts with the learned words; empty if there are none.
    """

    deltas: Deltas
    without: dict[str, Tensor]
    live: dict[str, Tensor]
    words: dict[str, Tensor]


def reference(job: Job) -> Reference:
    """Compute it once per export, whatever the number of formats."""
    without = outputs(job.family, job.components)
    with adapter_applied(job.family, job.components, job.file):
        live = outputs(job.family, job.components)
        words = outputs(job.family, job.components, word_prompts(job)) if job.file.header.tokens else {}
    return Reference(deltas(job), without, live, words)


def word_prompts(job: Job) -> tuple[str, ...]:
    """Prompts with the first and the last learned word."""
    words = job.file.header.tokens
    return f"a photo of {words[0]}", f"{words[-1]} by the sea"


def wanted_deltas(truth: Reference, outcome: Outcome) -> Deltas:
    """What the file was meant to say: the adapter, or what was written in its place."""
    if outcome.wanted is None:
        return truth.deltas
    return {
        place: partial(_as_deltas, update.delta) for place, update in outcome.wanted.updates.items()
    }


def _as_deltas(delta: Any) -> dict[str, Tensor]:
    return {"weight": delta().double()}


def verify(job: Job, path: Path, reader: str, truth: Reference, outcome: Outcome) -> Verification:
    """Read a written file back and compare.

    Raises:
        ExportError: if the reader refuses the file, misses or adds a layer, or anything differs more than
            rounding explains; the worst layers are named. An approximation is held against what was to be written,
            and how far its outputs are from the trained ones is measured, not limited.
    """
    problems = [problem for file, digests in outcome.digests.items() for problem in differing(file, digests)]
    if problems:
        raise ExportError(f"{path.name} does not read back as it was written.", first_few(problems))
    reading = _read(job, path, reader)
    weights = (0.0, 0.0, "")
    if reading.deltas is not None:
        weights = _compare_weights(job, path, reader, wanted_deltas(truth, outcome), reading)
    max_abs, relative = _difference(truth.live, outputs(job.family, reading.components))
    if reading.words and truth.words:
        told = outputs(job.family, reading.components, word_prompts(job))
        max_abs, relative = max((max_abs, relative), _difference(truth.words, told))
    effect = max(
        _difference(truth.live, truth.without)[1], _difference(truth.words, truth.without)[1] if truth.words else 0.0
    )
    limit = COMPUTE_LIMIT
    if job.dtype != torch.float32:
        limit += AMPLIFICATION * ROUNDING[job.dtype] * effect
    result = Verification(reader, reading.modules, *weights, max_abs, relative, effect, limit)
    # What a half-precision merge loses is limited in `merged`; its file was compared bit by bit.
    rounded = reading.deltas is None and job.dtype != torch.float32
    if not relative <= limit and not rounded and outcome.wanted is None:
        raise ExportError(
            f"{path.name} was not kept: read back by {reader}, the model's outputs differ by {relative:.2e} "
            f"of their size (at most {limit:.0e}).",
            [f"weights differ most in {result.worst_module or 'no module'}; report this, or export in fp32."],
        )
    return result


def _read(job: Job, path: Path, reader: str) -> Reading:
    verbosity = diffusers.logging.get_verbosity()
    # keep: diffusers warns of every network that the adapter leaves alone; what is missing is found below.
    diffusers.logging.set_verbosity_error()
    try:
        return READERS[reader](job, path)
    except ExportError:
        raise
    except Exception as error:  # whatever a foreign reader raises, the file is of no use to its users
        first_line = (str(error).splitlines() or [""])[0]
        raise ExportError(
            f"{path.name} was not kept: the {reader} reader refuses it.",
            [f"{type(error).__name__}: {first_line}", *_advice(job)],
        ) from error
    finally:
        diffusers.logging.set_verbosity(verbosity)


@torch.no_grad()
def outputs(
    family: ModelFamily, components: Components, prompts: Sequence[str] = PROMPTS
) -> dict[str, Tensor]:
    """What the text encoders and the denoiser say to fixed prompts, noise and timesteps; computed in fp32.

    TF32 is off meanwhile: its rounding would hide a difference.
    """
    device = family.device_of(components.denoiser)
    config: Any = components.denoiser.config
    side = min(int(getattr(config, "sample_size", None) or LARGEST_SIDE), LARGEST_SIDE)
    shape = (len(prompts), family.input_channels(components.denoiser), side, side)
    noisy = torch.randn(shape, generator=rng(0, "verify")).to(device)
    pixels = torch.full((len(prompts), 2), side * 8, device=device)
    sizes = SizeConditioning(pixels, torch.zeros_like(pixels), pixels)
    tokens = {
        name: ids.to(device) for name, ids in family.tokenize(components.tokenizers, list(prompts)).items()
    }
    with ExitStack() as stack:
        stack.enter_context(evaluating(components))
        stack.enter_context(torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False))
        for network in (components.denoiser, *components.text_encoders.values()):
            stack.enter_context(computing_in_fp32(network))
        conditioning = family.encode_prompts(components.text_encoders, tokens)
        timesteps = torch.tensor([100, 700], device=device)
        prediction = family.predict(components.denoiser, noisy, timesteps, conditioning, sizes)
    return {name: tensor.float().cpu() for name, tensor in {**conditioning, "prediction": prediction}.items()}


def _compare_weights(
    job: Job, path: Path, reader: str, wanted: Deltas, reading: Reading
) -> tuple[float, float, str]:
    """(largest absolute, largest relative difference, worst module)."""
    read = reading.deltas or {}
    # A reader may hold the adapter in the base's own, narrower number format.
    limit = max(ROUNDING[job.dtype], ROUNDING[reading.dtype])
    problems = [f"{'.'.join(key)} is not loaded." for key in sorted(set(wanted) - set(read))]
    problems += [
        f"{'.'.join(key)} is changed, though the adapter leaves it alone." for key in set(read) - set(wanted)
    ]
    measured = []
    for key in sorted(set(wanted) & set(read)):
        ours, theirs = wanted[key](), read[key]()
        problems += [f"{'.'.join(key)} loses its {name}." for name in ours if name not in theirs and ours[name].any()]
        for name in sorted(ours.keys() & theirs.keys()):
            difference = theirs[name].double().cpu().reshape(ours[name].shape) - ours[name].cpu()
            # keep: numbers, not tensors: each of those would pin the memory of large ones that came before it.
            norms = float(difference.norm()), float(ours[name].norm()), float(difference.abs().max())
            measured.append((".".join(key), *norms))
    least = NEGLIGIBLE * max((size for _, _, size, _ in measured), default=0.0)
    figures = sorted(
        ((lost / (max(size, least) or 1.0), most, name) for name, lost, size, most in measured), reverse=True
    )
    problems += [
        f"{name} differs by {relative:.2e} of its size."
        for relative, _, name in figures
        if not relative <= limit
    ]
    if problems:
        raise ExportError(
            f"{path.name} was not kept: read back by {reader}, {counted(len(problems), 'module is', 'modules are')} "
            f"not what was trained (at most {limit:.0e} of a module's change may be lost in {job.dtype_name}).",
            [*first_few(problems), *_advice(job)],
        )
    if not figures:
        return 0.0, 0.0, ""
    return max(largest for _, largest, _ in figures), figures[0][0], figures[0][2]


def _advice(job: Job) -> list[str]:
    """diffusers finds a text encoder's modules in kohya layout only if all four projections are there."""
    trained = {(component, module.rsplit(".", 1)[-1]) for component, module in job.file.layers()}
    missing = [
        f"{component}'s {projection}"
        for component in job.file.components()
        if component != job.family.denoiser and component not in job.family.t5_tokens
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj")
        if (component, projection) not in trained
    ]
    if not missing:
        narrow = "" if job.dtype == torch.float32 else (
            f"a change as small as a few steps at a low learning rate make is lost in {job.dtype_name}: train on, or "
            "export with --dtype fp32 (export.dtype=fp32); else "
        )  # fmt: skip
        return [f"{narrow}leave this format out, and report this."]
    return [f"diffusers needs all attention projections: train {', '.join(missing)} too, or leave this out."]


def _difference(truth: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, float]:
    """(largest absolute difference, largest difference over the largest true value); NaN stays NaN."""
    differences = {name: float((other[name] - tensor).abs().max()) for name, tensor in truth.items()}
    relative = [differences[name] / float(tensor.abs().max()) for name, tensor in truth.items()]
    worst = float(torch.tensor(relative).max())
    return float(torch.tensor(list(differences.values())).max()), worst
