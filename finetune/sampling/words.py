"""Prompts, as training reads them, for a diffusers pipeline."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.errors import ConfigError
from finetune.families.base import Components, ModelFamily
from finetune.sampling.weighting import emphasise, plain, weights


def told(
    family: ModelFamily, components: Components, prompts: list[str], negative: str | None, *, emphasis: bool
) -> dict[str, Tensor]:
    """Arguments of a pipeline's call: the prompts, and what guidance steers away from unless that is None.

    Args:
        emphasis: read brackets as emphasis; see `weighting`.

    Raises:
        ConfigError: for emphasis where it is not defined.
    """
    arguments = _one_side(family, components, prompts, "", emphasis=emphasis)
    if negative is not None:
        arguments |= _one_side(family, components, [negative] * len(prompts), "negative_", emphasis=emphasis)
    return arguments


def _one_side(
    family: ModelFamily, components: Components, prompts: list[str], prefix: str, *, emphasis: bool
) -> dict[str, Tensor]:
    """Prompts as training reads them, as arguments of the pipeline's call."""
    device = family.device_of(next(iter(components.text_encoders.values())))
    words = [plain(prompt) for prompt in prompts] if emphasis else prompts
    tokens = {name: ids.to(device) for name, ids in family.tokenize(components.tokenizers, words).items()}
    conditioning = family.encode_prompts(components.text_encoders, tokens)
    if emphasis:
        conditioning |= _emphasised(family, components, prompts, conditioning)
    return {prefix + argument: conditioning[name] for name, argument in family.pipeline_prompts.items()}


def _emphasised(
    family: ModelFamily, components: Components, prompts: list[str], conditioning: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The encoded tokens with those in brackets made louder; empty if no prompt has any."""
    states = conditioning["encoder_hidden_states"]
    tokenizer = next(iter(components.tokenizers.values()))
    found = [weights(prompt, tokenizer, states.shape[1]) for prompt in prompts]
    if all(row is None for row in found):
        return {}
    if family.t5_tokens:
        raise ConfigError(
            f"{prompts[0]!r} has emphasis in brackets, which is defined for CLIP; {family.name} also reads T5. Take "
            "the brackets out, or put a backslash before each to mean it plainly."
        )
    factors = torch.stack([torch.ones(states.shape[1]) if row is None else row for row in found])
    return {"encoder_hidden_states": emphasise(states, factors.to(states.device))}
