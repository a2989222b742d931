"""What a checkpoint and its user say about its noise schedule, brought together before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune.errors import ConfigError
from finetune.families.choices import Choices


@dataclass(frozen=True)
class Said:
    """What a checkpoint says of itself.

    Attributes:
        prediction: "epsilon", "v_prediction", "sample" or "flow"; None if it does not say.
        zero_terminal_snr: whether its last timestep is pure noise; None if it does not say.
        evidence: where it says so, in words.
        must_say: why the user must say it when the checkpoint does not; None where the layout has a convention.
    """

    prediction: str | None
    zero_terminal_snr: bool | None
    evidence: str
    must_say: str | None = None


def settled(said: Said, scheduler: Mapping[str, Any], base: str, choices: Choices) -> dict[str, Any]:
    """The noise schedule, with what the user had to say about it.

    Raises:
        ConfigError: if the checkpoint itself says otherwise, or nobody says.
    """
    asked = {"prediction": choices.prediction, "zero_terminal_snr": choices.zero_terminal_snr}
    known = {"prediction": said.prediction, "zero_terminal_snr": said.zero_terminal_snr}
    problems = [
        f"model.{key}={asked[key]} contradicts the checkpoint, which says {known[key]} ({said.evidence}); leave it out"
        for key in asked
        if asked[key] is not None and known[key] is not None and asked[key] != known[key]
    ]
    if "flow" in (choices.prediction, said.prediction) and choices.zero_terminal_snr is not None:
        problems.append("model.zero_terminal_snr is for noise schedules of SD1, SD2 and SDXL; leave it out")
    prediction = said.prediction or choices.prediction
    if prediction is None and said.must_say:
        problems.append(f"{said.must_say}; set model.prediction=v_prediction or model.prediction=epsilon")
    if problems:
        raise ConfigError(f"model.base={base} cannot be trained as asked:", problems)
    found = dict(scheduler)
    if prediction not in (None, "flow"):
        found["prediction_type"] = prediction
    if choices.zero_terminal_snr or said.zero_terminal_snr:
        # keep: pure noise is only ever seen when sampling starts at the very last timestep.
        found |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return found
