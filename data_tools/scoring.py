"""Which models can score pictures, by name, and what they are asked; loading them is `scorers`' work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from data_tools.errors import UsageError
from data_tools.rules import Rule

CLIP = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class ScorerSpec:
    """A model, what it is asked, and what follows from its answer."""

    name: str
    model: str
    """A hub id or a local folder."""
    rule: Rule
    """When the number, 0 to 1, speaks."""
    label: str | None = None
    """Of a picture classifier: the label whose probability is the score. None: two sentences are compared."""
    sentences: tuple[str, str] = ("", "")
    """Of a zero-shot model: the score is how much better the first one fits."""


SCORERS: Mapping[str, ScorerSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            ScorerSpec(
                "safety",
                "Falconsai/nsfw_image_detection",
                Rule(0.5, "review", "probability that the picture is not safe for work, above this", above=True),
                label="nsfw",
            ),
            ScorerSpec(
                "watermark",
                CLIP,
                Rule(0.7, "review", "how much more it looks like a picture with a watermark, above this", above=True),
                sentences=("a picture with a watermark or a logo over it", "a clean picture without any text"),
            ),
            ScorerSpec(
                "aesthetic",
                CLIP,
                Rule(0.2, "review", "how much more it looks like a good photograph than like a bad one, below this"),
                sentences=("a beautiful, well composed photograph", "an ugly, badly lit snapshot"),
            ),
        )
    }
)
"""By name. Limits are rules of thumb: look at what a score says about your pictures before you trust it."""


def choose_scorers(names: Sequence[str], models: Mapping[str, str], labels: Mapping[str, str]) -> list[ScorerSpec]:
    """The scorers asked for, with other models and labels where they are given.

    A name that is not in `SCORERS` is a classifier of the user's own: it needs a model and a label.

    Raises:
        UsageError: naming everything that does not fit, at once.
    """
    chosen, wrong = [], []
    for name in dict.fromkeys(names):
        known = SCORERS.get(name)
        if known is None and not (name in models and name in labels):
            wrong.append(
                f"{name!r} is none of {', '.join(SCORERS)}; for a classifier of your own add --score-model "
                f"{name}=PLACE and --score-label {name}=LABEL"
            )
            continue
        meaning = f"probability of {labels.get(name)!r}, above this"
        spec = known or ScorerSpec(name, models[name], Rule(0.5, "review", meaning, above=True))
        chosen.append(replace(spec, model=models.get(name, spec.model), label=labels.get(name, spec.label)))
    unused = sorted({*models, *labels} - {*names})
    wrong += [f"a model or label is given for {name!r}, but --score {name} is not" for name in unused]
    if wrong:
        raise UsageError("These scorers cannot be used:", wrong)
    return chosen
