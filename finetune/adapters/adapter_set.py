"""Everything a run trains, as one thing: parameters by canonical name, saved, loaded and switched off together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters.beside import Beside
from finetune.adapters.files import TOKENS, AdapterFile, AdapterHeader
from finetune.adapters.methods import METHODS
from finetune.adapters.parts import Part, Target
from finetune.adapters.tokens import Words, WordTarget
from finetune.adapters.whole import Whole
from finetune.errors import CheckpointError


class AdapterSet:
    """The trained parts of one run."""

    def __init__(self, parts: Sequence[Part], options: Mapping[str, Any]) -> None:
        """Join `parts`; `options` go into the header of every file."""
        self._parts = parts
        self._options = dict(options)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by its canonical name, e.g. "unet.mid_block....to_q.lora_A.weight"."""
        return {name: value for part in self._parts for name, value in part.parameters.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Every trained parameter and every constant that one rests on, by canonical name; the live tensors."""
        constants = {name: value for part in self._parts for name, value in part.constants.items()}
        return {**self.named_parameters(), **constants}

    def parameter_groups(self) -> list[dict[str, object]]:
        """Optimizer groups: one per network and learning rate."""
        groups: dict[tuple[str, float], list[nn.Parameter]] = {}
        for part in self._parts:
            for name, rate in part.learning_rates().items():
                groups.setdefault((name.partition(".")[0], rate), []).append(part.parameters[name])
        return [
            {"params": parameters, "lr": rate, "name": f"{component} at {rate:g}"}
            for (component, rate), parameters in groups.items()
        ]

    def rates(self) -> dict[str, list[float]]:
        """Network, or "words", -> its learning rates, rising."""
        found: dict[str, set[float]] = {}
        for part in self._parts:
            for name, rate in part.learning_rates().items():
                found.setdefault("words" if f".{TOKENS}." in name else name.partition(".")[0], set()).add(rate)
        return {what: sorted(rates) for what, rates in found.items()}

    def told_rates(self) -> str:
        """The learning rates in words: one number if all are alike."""
        told = {
            what: f"{rates[0]:g}" + (f" to {rates[-1]:g}" if len(rates) > 1 else "")
            for what, rates in self.rates().items()
        }
        alike = set(told.values())
        return alike.pop() if len(alike) == 1 else ", ".join(f"{rate} for {what}" for what, rate in told.items())

    def moving(self, step: int, steps: int, *, keep_graph: bool) -> dict[str, nn.Parameter]:
        """The parameters that optimizer step `step` (from 0) of `steps` still moves; the others stay as they are.

        Args:
            keep_graph: let those that rest take part in the backward pass, as DDP expects of what it was built with;
                their gradients must then be thrown away.
        """
        found: dict[str, nn.Parameter] = {}
        for part in self._parts:
            moves = step < max(1, round(part.train_share * steps))
            for parameter in part.parameters.values():
                parameter.requires_grad_(moves or keep_graph)
            found |= part.parameters if moves else {}
        return found

    def after_step(self, moving: Mapping[str, nn.Parameter]) -> None:
        """What the parts that moved do to their parameters after an optimizer step."""
        for part in self._parts:
            if part.parameters.keys() <= moving.keys():
                part.after_step()

    def state(self) -> dict[str, Tensor]:
        """A copy of every trained tensor, and of the constants they rest on, in fp32 on the CPU."""
        return {name: value.detach().float().cpu().clone() for name, value in self.tensors().items()}

    def trained(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a file's tensors what this run trains, without the constants."""
        unpacked = self._unpacked(tensors)
        return {name: unpacked[name] for name in self.named_parameters() if name in unpacked}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put saved tensors in place, as `state` or a file gives them; constants only where they are given.

        Raises:
            CheckpointError: if names or shapes are not exactly those of this run.
        """
        own, needed = self.tensors(), self.named_parameters().keys()
        tensors = self._unpacked(tensors)
        problems = [f"{name} is missing" for name in needed - tensors.keys()]
        problems += [f"{name} does not belong to this run" for name in tensors.keys() - own.keys()]
        problems += [
            f"{name} has shape {tuple(tensors[name].shape)}, this run needs {tuple(own[name].shape)}"
            for name in own.keys() & tensors.keys()
            if own[name].shape != tensors[name].shape
        ]
        if problems:
            raise CheckpointError("The saved adapter does not fit this run:", sorted(problems))
        for name, parameter in own.items():
            if name in tensors:
                parameter.copy_(tensors[name])

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model as it was, for as long as the context lasts; learned words mean what they started from."""
        with contextlib.ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.disabled())
            yield

    def describe(self) -> list[tuple[str, str]]:
        """(what, in words) for the plan."""
        rows = []
        for part in self._parts:
            ends = f", in the first {part.train_share:.0%} of the steps" if part.train_share < 1 else ""
            rows += [(what, f"{words}{ends}") for what, words in part.describe()]
        return rows

    def to_file(
        self,
        tensors: dict[str, Tensor],
        *,
        family: str,
        base: str,
        base_digest: str,
        trigger_words: tuple[str, ...],
        run_digest: str,
        step: int,
    ) -> AdapterFile:
        """The adapter as a file on disk would hold it; `tensors` are `state()` or their running mean."""
        held: dict[str, Tensor] = {}
        fields: dict[str, Any] = {"method": {}, "rank": {}, "alpha": {}, "rank_pattern": {}, "alpha_pattern": {}}
        for part in self._parts:
            own, said = part.header(tensors)
            held |= own
            for key, value in said.items():
                fields[key] = fields[key] | value if isinstance(value, dict) else value
        header = AdapterHeader(
            family=family,
            base=base,
            base_digest=base_digest,
            trigger_words=trigger_words,
            run_digest=run_digest,
            step=step,
            options=self._options,
            **fields,
        )
        return AdapterFile(tensors=held, header=header)

    def _unpacked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        unpacked = dict(tensors)
        for part in self._parts:
            unpacked |= part.unpacked(tensors)
        return unpacked



def attach(
    targets: Sequence[Target], seed: int, words: Sequence[WordTarget] = (), options: Mapping[str, Any] | None = None
) -> AdapterSet:
    """Put fresh adapters into every target network; the networks' outputs do not change by it.

    Args:
        targets: which layers of which networks are changed.
        seed: the run's seed; each tensor's start depends on it, on the tensor's name and on the layer's weight only.
        words: what text encoders learn besides.
        options: goes into the header of every file.
    """
    for module in [target.module for target in targets] + [target.encoder for target in words]:
        module.requires_grad_(False)
    # keep: whole weights are named before the embedding is wrapped, which would change their names.
    parts: list[Part] = [
        Beside(target, seed) if METHODS[target.method].beside else Whole(target) for target in targets if target.layers
    ]
    parts += [Words(target) for target in words]
    return AdapterSet(parts, options or {})
