"""One optimizer step: noise the latents, predict, compare, step. Nothing here reads a value back from the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """

    loss: Tensor
    grad_norm: Tensor
    finite: Tensor


def batch_losses(model: nn.Module, objective: Objective, batch: Batch, accelerator: Accelerator) -> Tensor:
    """Weighted loss of every picture of a batch, (B,), fp32.

    DreamBooth: a class picture's loss is multiplied by `prior_loss_weight` (Ruiz et al. 2023,
        arXiv:2208.12242, eq. 2).
    """
    clean = batch.latents.sample(batch.latent_noise)
    timesteps = objective.timesteps(batch.quantiles)
    noisy = objective.add_noise(clean, batch.noise, timesteps)
    with accelerator.autocast():
        prediction = model(noisy, timesteps, batch.conditioning, batch.tokens, batch.sizes)
    return objective.loss(prediction.float(), clean, batch.noise, timesteps) * batch.loss_weight


def training_step(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    named: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    max_grad_norm: float,
) -> StepResult:
    """Accumulate the gradient over `batches`, clip it, and move the parameters.

    The loss is the sum over the step's pictures divided by their number over all processes, so a smaller last
    batch weighs no more per picture than a full one. DDP averages gradients over processes, hence the factor.

    Raises:
        NumericError: naming the parameters that got no gradient, for they would never learn.
    """
    total = torch.zeros((), device=accelerator.device)
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            losses = batch_losses(model, objective, batch, accelerator)
            loss = losses.sum() * (accelerator.num_processes / batch.images_in_step)
            accelerator.backward(loss)
        total += loss.detach()
    unreached = [name for name, parameter in named.items() if parameter.grad is None]
    if unreached:
        raise NumericError("Parts of the adapter get no gradient and would never learn:", unreached)
    parameters = list(named.values())
    norm, finite = _move_parameters(parameters, optimizer, accelerator.scaler, max_grad_norm, total)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss=total, grad_norm=norm, finite=finite)


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
