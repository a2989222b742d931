"""One optimizer step: noise the latents, predict, compare, step. Nothing here reads a value back from the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.data.batch import Batch
from finetune.errors import NumericError
from finetune.objectives import Objective


@dataclass(frozen=True)
class StepResult:
    """What a step measured, still on the device.

    Attributes:
        loss: weighted mean over the step's pictures, ().
        grad_norm: length of the gradient before clipping, ().
        finite: whether the gradient was finite; if not, no parameter was moved by it, ().
        teacher: the teacher's weighted mean over the step's pictures; 0 without one, ().
        picture_losses: per batch, the loss of each picture before `loss_weight`, (B,).
    """

    loss: Tensor
    grad_norm: Tensor
    finite: Tensor
    teacher: Tensor
    picture_losses: tuple[Tensor, ...]


Question = Callable[[Batch], Tensor]
"""A second loss of the same step, per picture, (B,): the teacher's, see teacher.py."""


@dataclass(frozen=True)
class Answer:
    """What a model said to a noised batch: `prediction` in fp32 and `clean` latents (B, ...), `timesteps` (B,)."""

    prediction: Tensor
    clean: Tensor
    timesteps: Tensor

    def losses(self, objective: Objective, batch: Batch) -> Tensor:
        """Loss of every picture before `loss_weight`, (B,), fp32."""
        return objective.loss(self.prediction, self.clean, batch.noise, self.timesteps, batch.loss_mask)


def batch_losses(model: nn.Module, objective: Objective, batch: Batch, accelerator: Accelerator) -> Tensor:
    """Loss of every picture of a batch before `loss_weight`, (B,), fp32."""
    return answer(model, objective, batch, accelerator).losses(objective, batch)


def answer(model: nn.Module, objective: Objective, batch: Batch, accelerator: Accelerator) -> Answer:
    """Noise the latents and ask the model, which sees `input_noise` where that differs from the noise it must name."""
    clean = batch.latents.sample(batch.latent_noise)
    timesteps = objective.timesteps(batch.quantiles)
    noisy = objective.add_noise(clean, batch.noise if batch.input_noise is None else batch.input_noise, timesteps)
    with accelerator.autocast():
        prediction = model(batch.shown(noisy), timesteps, batch.conditioning, batch.tokens, batch.sizes)
    return Answer(prediction.float(), clean, timesteps)


def training_step(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    max_grad_norm: float,
    question: Question | None = None,
) -> StepResult:
    """Accumulate the gradient over `batches`, clip it, and move the parameters.

    The loss is the sum over the step's pictures divided by their number over all processes, so a smaller last
    batch weighs no more per picture than a full one. DDP averages gradients over processes, hence the factor.
    A class picture's loss is multiplied by its `loss_weight`, the prior_loss_weight of DreamBooth (Ruiz et al.
    2023, arXiv:2208.12242, eq. 2).

    Args:
        named: the parameters that move, by name; the optimizer may hold others, which rest.
        question: what the batches are asked besides; its gradient is added.

    Raises:
        NumericError: naming the parameters that got no gradient, for they would never learn.
    """
    total, teacher = torch.zeros((), device=accelerator.device), torch.zeros((), device=accelerator.device)
    seen = []
    for i, batch in enumerate(batches):
        scale = accelerator.num_processes / batch.images_in_step
        if question is not None:
            with accelerator.no_sync(model):
                loss = (question(batch) * batch.loss_weight).sum() * scale
                accelerator.backward(loss)
            teacher += loss.detach()
        with nullcontext() if i == len(batches) - 1 else accelerator.no_sync(model):
            losses = batch_losses(model, objective, batch, accelerator)
            loss = (losses * batch.loss_weight).sum() * scale
            accelerator.backward(loss)
        total += loss.detach()
        seen.append(losses.detach())
    unreached = [name for name, parameter in named.items() if parameter.grad is None]
    if unreached:
        raise NumericError("Parts of the adapter get no gradient and would never learn:", unreached)
    parameters = list(named.values())
    _forget_others(optimizer, parameters)
    norm, finite = _move_parameters(parameters, optimizer, accelerator.scaler, max_grad_norm, total + teacher)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss=total, grad_norm=norm, finite=finite, teacher=teacher, picture_losses=tuple(seen))


def _forget_others(optimizer: torch.optim.Optimizer, moving: Sequence[nn.Parameter]) -> None:
    """Throw away the gradients of parameters that rest: every optimizer passes over a parameter without one."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(held) > len(moving):
        kept = set(moving)
        for parameter in held:
            if parameter not in kept:
                parameter.grad = None


def _move_parameters(
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    max_grad_norm: float,
    loss: Tensor,
) -> tuple[Tensor, Tensor]:
    """Clip and step; the gradient's length and whether all was finite.

    Without a scaler a gradient that is not finite is replaced by zeros on the device. With one (fp16) an overflowing
    gradient is routine: the scaler skips that step and lowers its scale, so only the loss itself is judged.
    """
    if scaler is not None:
        # keep: the optimizer is not prepared by accelerate, so its scaling is undone here.
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
        return torch.where(torch.isfinite(norm), norm, 0.0), torch.isfinite(loss)
    finite = torch.isfinite(norm) & torch.isfinite(loss)
    broken = ~finite
    for parameter in parameters:
        assert parameter.grad is not None, "checked by the caller"
        parameter.grad.masked_fill_(broken, 0.0)
    optimizer.step()
    return norm, finite
