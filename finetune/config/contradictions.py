"""Combinations of fields that cannot work together, each with the way out. To add one, write and list its function."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.config.run import Run


def has_word(text: str, word: str) -> bool:
    """Whether a word or phrase stands in a text as such: sks in "a sks, running", but not in "desks"."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def warm_up(run: Run) -> list[str]:
    """The learning rate must reach its value."""
    if run.optimizer.warmup_steps < run.train.steps:
        return []
    return [
        f"optimizer.warmup_steps={run.optimizer.warmup_steps} is not below train.steps={run.train.steps}, so the "
        "learning rate would never reach its value; lower warmup_steps or raise steps"
    ]


def template(run: Run) -> list[str]:
    """Captions from a template need one."""
    if run.data.captions != "template" or run.data.caption_template:
        return []
    return ["data.captions=template needs data.caption_template, e.g. \"a photo of sks dog\""]


def trigger(run: Run) -> list[str]:
    """The subject's word stands where the subject is, and nowhere else."""
    word, sentence = run.data.trigger, run.data.caption_template
    if not word:
        return []
    problems = []
    if sentence and not has_word(sentence, word):
        problems.append(
            f"data.trigger={word!r} does not stand in data.caption_template={sentence!r}, so the trigger would not "
            "be learned; put it into the template or drop data.trigger"
        )
    if run.data.prior:
        problems += [
            f"data.prior.prompts has {prompt!r}, which contains the trigger {word!r}: class pictures would teach "
            "the ordinary class under the subject's name; take the trigger out of the class prompt"
            for prompt in run.data.prior.prompts
            if has_word(prompt, word)
        ]
    return problems


def export_name(run: Run) -> list[str]:
    """The file for ComfyUI and A1111 must not take the diffusers file's name."""
    name = run.export.name
    if not name or not (name == "pytorch_lora_weights" or name.endswith(".")):
        return []
    return [
        f"export.name={name} is the name of the diffusers file or ends in a dot; choose another, it "
        "becomes the file for ComfyUI and A1111"
    ]


def betas(run: Run) -> list[str]:
    """Running means need a decay below one."""
    return [
        f"optimizer.betas holds {beta}, but both must lie in [0, 1); 0.9,0.999 is usual"
        for beta in run.optimizer.betas
        if not 0 <= beta < 1
    ]


CHECKS: tuple[Callable[[Run], list[str]], ...] = (warm_up, template, trigger, export_name, betas)


def contradictions(run: Run) -> list[str]:
    """Every combination of fields of this run that cannot work, one text each."""
    return [problem for check in CHECKS for problem in check(run)]
