"""A small resumable training loop, paced by the clock, shared by every stage of the builder.

State is safetensors and JSON. Under `torchrun` the workers average their gradients; on CPU two one-thread workers use
two cores better than two OpenMP threads do.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from finetune.rng import rng as torch_rng
from finetune.rng import seed_for
from finetune.training.ema import Ema

# (share of the budget used, 0..1; source of numpy draws; source of torch draws) -> scalar loss
LossFunction = Callable[[float, np.random.Generator, torch.Generator], Tensor]


@dataclass
class Progress:
    """How far a stage is; everything else follows from it and from the settings."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    share: float = 0.0
    """Part of the time budget that is used up, 0..1; the learning rate follows from it."""


@dataclass(frozen=True)
class Settings:
    """How a stage is trained."""

    folder: Path
    """Where its state lies; an existing state is continued."""
    minutes: float
    """Time budget of the stage over all its runs."""
    batch: int
    """Pictures per worker and step."""
    learning_rate: float
    seed: int = 0
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    hold: float = 0.3
    """Share of the budget at the full learning rate; the rest decays to zero along a cosine."""
    warmup: int = 100
    """Steps of linear warm-up."""
    save_every: float = 150.0
    """Seconds between checkpoints."""


def rank_and_size() -> tuple[int, int]:
    """This worker's number and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def learning_rate(settings: Settings, progress: Progress) -> float:
    """Linear warm-up in steps, constant, then half a cosine to zero in time."""
    tail = max(0.0, progress.share - settings.hold) / (1.0 - settings.hold)
    decay = 0.5 * (1.0 + math.cos(math.pi * min(1.0, tail)))
    return settings.learning_rate * min(1.0, (progress.step + 1) / settings.warmup) * decay


def _average_gradients(params: list[Tensor], extra: float) -> float:
    """Replace every gradient by the mean over the workers; returns the mean of `extra` too (one message)."""
    _, size = rank_and_size()
    if size == 1:
        return extra
    gradients = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients] + [torch.tensor([extra])])
    distributed.all_reduce(flat)
    flat /= size
    start = 0
    for g in gradients:
        g.copy_(flat[start : start + g.numel()].view_as(g))
        start += g.numel()
    return float(flat[-1])


class Loop:
    """Weights, their running average and the optimizer of one stage, saved and restored together."""

    def __init__(self, module: nn.Module, settings: Settings):
        self.module, self.settings, self.progress = module, settings, Progress()
        self.params = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.params.values(),
            settings.learning_rate,
            (0.9, 0.99),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.average = Ema(self.params, settings.ema_decay)
        if (settings.folder / "progress.json").exists():
            self._restore()

    def _restore(self) -> None:
        folder = self.settings.folder
        self.progress = Progress(**json.loads((folder / "progress.json").read_text()))
        self.progress.share = self.progress.seconds / (60.0 * self.settings.minutes)  # the budget may have changed
        stored = load_file(folder / "state.safetensors")
        self.average.load({name: stored[f"average.{name}"] for name in self.params})
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(stored[f"weight.{name}"])
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.progress.step)),
                    # keep: the fused kernel walks raw memory, so moments must lie as their parameter does.
                    "exp_avg": torch.empty_like(p).copy_(stored[f"first.{name}"]),
                    "exp_avg_sq": torch.empty_like(p).copy_(stored[f"second.{name}"]),
                }

    def save(self) -> None:
        """Write the state beside the old one, then rename."""
        if rank_and_size()[0] != 0:
            return
        folder = self.settings.folder
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        average = self.average.state()
        for name, p in self.params.items():
            state = self.optimizer.state[p]
            found = {"weight": p.detach(), "average": average[name], "first": state["exp_avg"],
                     "second": state["exp_avg_sq"]}  # fmt: skip
            tensors.update({f"{kind}.{name}": t.contiguous().clone() for kind, t in found.items()})
        save_file(tensors, folder / "state.new")
        (folder / "progress.new").write_text(json.dumps(asdict(self.progress)))
        (folder / "state.new").replace(folder / "state.safetensors")
        (folder / "progress.new").replace(folder / "progress.json")

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the running average of the weights into the module."""
        for name, mean in self.average.state().items():
            self.params[name].copy_(mean)

    def steps(self, loss_of: LossFunction) -> Iterator[tuple[Progress, float]]:
        """Train until the budget is used up; yields the progress and the loss after every step."""
        settings, progress = self.settings, self.progress
        rank, size = rank_and_size()
        params = list(self.params.values())
        saved = started = time.monotonic()
        before = progress.seconds
        while progress.share < 1.0:
            ids = (progress.step, rank)
            rng = np.random.default_rng(seed_for(settings.seed, "numpy", *ids))
            generator = torch_rng(settings.seed, "torch", *ids)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(settings, progress)
            loss = loss_of(progress.share, rng, generator)
            loss.backward()
            _average_gradients(params, 0.0)
            norm = nn.utils.clip_grad_norm_(params, 1.0)
            if not bool(torch.isfinite(norm)):
                raise FloatingPointError(f"step {progress.step}: the gradient norm is {float(norm)}")
            self.optimizer.step()
            self.optimizer.zero_grad()
            progress.step += 1
            progress.samples += settings.batch * size
            progress.seconds = before + time.monotonic() - started
            progress.share = self._agree(progress.seconds / (60.0 * settings.minutes))
            self.average.update(progress.step)
            yield progress, float(loss.detach())
            if time.monotonic() - saved > settings.save_every:
                self.save()
                saved = time.monotonic()
        self.save()

    def _agree(self, share: float) -> float:
        """The first worker's clock counts, so that all stop at the same step."""
        if rank_and_size()[1] == 1:
            return share
        message = torch.tensor([share], dtype=torch.float64)
        distributed.broadcast(message, 0)
        return float(message)


def train(module: nn.Module, settings: Settings, loss_of: LossFunction, log_every: int = 50) -> Progress:
    """Run a stage to the end of its budget, leave the averaged weights in the module and return how far it came."""
    loop = Loop(module, settings)
    module.train()
    recent: list[float] = []
    log = settings.folder / "log.jsonl"
    settings.folder.mkdir(parents=True, exist_ok=True)
    for progress, loss in loop.steps(loss_of):
        recent.append(loss)
        if len(recent) == log_every and rank_and_size()[0] == 0:
            line = {
                **asdict(progress),
                "loss": sum(recent) / len(recent),
                "lr": learning_rate(settings, progress),
            }
            with log.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
        if len(recent) == log_every:
            recent = []
    loop.use_average()
    module.eval()
    return loop.progress


@torch.no_grad()
def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Redraw all weights from one generator, so that a build does not depend on the global random state.

    Matrices and kernels get uniform values of PyTorch's own width, embeddings normal ones, norms the identity,
    biases zero. Weights that their module starts at zero stay zero.
    """
    for part in module.modules():
        weight = getattr(part, "weight", None)
        if isinstance(part, nn.Embedding):
            part.weight.normal_(0.0, 0.3 / part.embedding_dim**0.25, generator=generator)
        elif isinstance(weight, nn.Parameter) and weight.dim() >= 2 and bool(weight.any()):
            reach = (1.0 / weight[0].numel()) ** 0.5
            weight.uniform_(-reach, reach, generator=generator)
        bias = getattr(part, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.zero_()
