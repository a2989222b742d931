"""Samplers by the names people know; each keeps the checkpoint's own noise schedule and prediction type."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from finetune.errors import ConfigError, nearest

if TYPE_CHECKING:
    from finetune.families.base import Components

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++_2m_karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_2m_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpm++_2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
"""name -> diffusers class and what is set besides the checkpoint's own noise schedule. Those whose name begins with
flow_ are for flow-matching bases, all others for bases with a diffusion schedule."""

FLOW = "flow_"


def build_scheduler(components: Components, name: str | None, *, sigmas: bool = False) -> Any:
    """The checkpoint's own scheduler, or another on the checkpoint's noise schedule.

    Args:
        name: a name in SCHEDULERS; None is the checkpoint's own.
        sigmas: whether the pipeline hands it noise levels of its own, which not every sampler takes.

    Raises:
        ConfigError: if there is no such name, or it does not fit what the base was trained on.
    """
    import diffusers  # noqa: PLC0415 - takes seconds, and the names above are judged without it

    own = str(components.scheduler_config.get("_class_name", "DDIMScheduler"))
    if name is None:
        return getattr(diffusers, own).from_config(components.scheduler_config)
    flow = {known for known in SCHEDULERS if known.startswith(FLOW)}
    takers = {known for known in SCHEDULERS if not sigmas or _takes_sigmas(getattr(diffusers, SCHEDULERS[known][0]))}
    fitting = [known for known in SCHEDULERS if (known in flow) == own.startswith("FlowMatch") and known in takers]
    if name not in SCHEDULERS:
        raise ConfigError(
            f"scheduler={name!r} is not known{nearest(name, fitting)}; for this base choose {', '.join(fitting)}, "
            "or none for the checkpoint's own."
        )
    if name not in fitting:
        raise ConfigError(
            f"scheduler={name} does not fit: {components.source} comes with {own}; choose {', '.join(fitting)}, "
            "or none for the checkpoint's own."
        )
    class_name, settings = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(components.scheduler_config, **settings)


def _takes_sigmas(scheduler: Any) -> bool:
    return "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
