"""Prior preservation without class pictures: the frozen base is the teacher.

DreamBooth keeps "a dog" an ordinary dog by training on class pictures that the base once rendered. Here the base is
asked directly, on what is in the batch anyway: the subject's noised latents under a class prompt c,

    loss = weight * every * d(model(x_t, t, c), base(x_t, t, c))

with d the objective's own loss and weighting, and base the same network with its adapters off and without a gradient.
No pictures are rendered, stored or encoded; a step that asks costs one more training pass and one forward pass, so with
`every = n` training costs about 1 + 4 / (3 n) of itself.

Source: the prior of Ruiz et al. 2023, arXiv:2208.12242, eq. 2, with the base's answer in place of its pictures, as in
Li and Hoiem 2016, Learning without Forgetting, arXiv:1606.09282.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.adapters import AdapterSet
from finetune.config import TeacherConfig
from finetune.data.batch import Batch, Collator
from finetune.families.base import Conditioning
from finetune.objectives import Objective
from finetune.training.step import Question


class Teacher:
    """Asks the base and the model the same thing under a class prompt."""

    def __init__(
        self, config: TeacherConfig, model: nn.Module, adapters: AdapterSet, objective: Objective, collator: Collator,
        accelerator: Accelerator,
    ) -> None:  # fmt: skip
        """Prepare the class prompts; `model` is the one that trains."""
        self._config = config
        self._model = model
        self._adapters = adapters
        self._objective = objective
        self._accelerator = accelerator
        self._prompts = [self._moved(collator.describe([prompt])) for prompt in config.prompts]

    def question(self, step: int) -> Question | None:
        """What step `step`, from 0, is asked, or None; prompts are used in turn, the same one in all processes."""
        if step % self._config.every:
            return None
        prompt = self._prompts[step // self._config.every % len(self._prompts)]
        return lambda batch: self._losses(batch, *prompt)

    def _losses(self, batch: Batch, conditioning: Conditioning | None, tokens: dict[str, Tensor] | None) -> Tensor:
        clean = batch.latents.sample(batch.latent_noise)
        timesteps = self._objective.timesteps(batch.quantiles)
        noisy = self._objective.add_noise(clean, batch.noise, timesteps)
        count = len(noisy)
        inputs = (batch.shown(noisy), timesteps, _repeated(conditioning, count), _repeated(tokens, count), batch.sizes)
        # keep: not through DDP, which would wait for a backward pass that never comes.
        base = self._accelerator.unwrap_model(self._model)
        with self._adapters.disabled(), torch.no_grad(), self._accelerator.autocast():
            wanted = base(*inputs)
        with self._accelerator.autocast():
            answer = self._model(*inputs)
        losses = self._objective.distance(answer.float(), wanted.float(), timesteps, batch.loss_mask)
        return losses * (self._config.weight * self._config.every)

    def _moved(
        self, described: tuple[Conditioning | None, dict[str, Tensor] | None]
    ) -> tuple[Conditioning | None, dict[str, Tensor] | None]:
        conditioning, tokens = described
        device = self._accelerator.device
        return tuple(  # type: ignore[return-value]
            {name: tensor.to(device) for name, tensor in part.items()} if part is not None else None
            for part in (conditioning, tokens)
        )


def _repeated(tensors: dict[str, Tensor] | None, count: int) -> dict[str, Tensor] | None:
    if tensors is None:
        return None
    return {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in tensors.items()}
