"""The base as teacher: it costs nothing at the start, pulls towards the base, and leaves no trace of itself."""

from __future__ import annotations

import pytest
import torch

from finetune import make_run
from finetune.errors import ConfigError
from finetune.tracking import Reporter
from finetune.training import setup
from finetune.training.loop import Loop, one_step
from finetune.training.resume import Resume


def loop_of(document: dict, teacher: dict | None, checkpointing: bool = False) -> Loop:
    objective = {"teacher": teacher} if teacher else {}
    train = document["train"] | {"gradient_checkpointing": checkpointing, "batch_size": 2, "steps": 50}
    run = make_run(document | {"objective": objective, "train": train, "validation": {"every": 0}})
    loop = setup.prepare(run, Reporter(), Resume())
    loop.model.train()
    return loop


def drift(loop: Loop, prompt: str) -> float:
    """How far the model's answer to a prompt is from its base's, on one fixed question."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    conditioning, tokens = loop.collator.describe([prompt])
    batch = loop.collator.step(0, loop.draws(0)[:1], 0, 1)[0]
    sizes = type(batch.sizes)(*(getattr(batch.sizes, name)[:1] for name in ("original_size", "crop_top_left",
                                                                           "target_size")))  # fmt: skip
    with torch.no_grad():
        answer = loop.model(noise, torch.tensor([500]), conditioning, tokens, sizes)
        with loop.adapters.disabled():
            base = loop.model(noise, torch.tensor([500]), conditioning, tokens, sizes)
    return float((answer - base).norm())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_strong_teacher_keeps_the_class(document, checkpointing) -> None:
    """The same steps with and without: on the class prompt the model stays several times nearer to its base."""
    document["optimizer"] = {"name": "adamw", "learning_rate": 3e-3, "schedule": "constant"}
    drifts = []
    for teacher in (None, {"prompts": ["a robot"], "weight": 300.0, "every": 1}):
        loop = loop_of(document, teacher, checkpointing)
        results = [one_step(loop, step, 1.0)[0] for step in range(10)]
        drifts.append(drift(loop, "a robot"))
        if teacher:
            # keep: a fresh adapter answers as the base does, so the first question costs nothing.
            assert float(results[0].teacher) == 0 and float(results[1].teacher) > 0
            assert all(bool(result.finite) for result in results)
    assert drifts[1] < 0.5 * drifts[0]


def test_prompts_take_turns_and_weigh_for_the_steps_between(document) -> None:
    """Every third step asks, three times as heavily; two prompts alternate."""
    teacher = {"prompts": ["a robot", "a cat"], "weight": 0.5, "every": 3}
    loop = loop_of(document, teacher)
    assert [step for step in range(9) if loop.teacher.question(step)] == [0, 3, 6]
    one_step(loop, 1, 1.0)
    batch = loop.collator.step(0, loop.draws(0)[:1], 0, 1)[0]
    asked = [loop.teacher.question(step)(batch) for step in (0, 3, 6)]
    assert torch.equal(asked[0], asked[2]) and not torch.equal(asked[0], asked[1])
    single = loop_of(document | {"output_dir": document["output_dir"] + "-2"}, teacher | {"every": 1})
    single.adapters.load(loop.adapters.state())
    torch.testing.assert_close(asked[0], 3 * single.teacher.question(0)(batch))


def test_what_contradicts_a_teacher_is_refused(document) -> None:
    """Two priors at once, and a class prompt that names the subject."""
    document["data"] = document["data"] | {"prior": {"prompts": ["a robot"]}}
    with pytest.raises(ConfigError) as caught:
        make_run(document | {"objective": {"teacher": {"prompts": ["a sks robot"]}}})
    text = str(caught.value)
    assert "both keep the class; choose one" in text and "contains the trigger 'sks'" in text
