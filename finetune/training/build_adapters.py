"""From a `Run` to what is trained."""

from __future__ import annotations

from functools import partial

from finetune.adapters import AdapterSet, Shape, Target, attach
from finetune.config import AdapterConfig, Run
from finetune.families import Components, ModelFamily
from finetune.families.text import canonical


def build_targets(
    run_adapter: AdapterConfig, text_adapter: AdapterConfig | None, learning_rate: float, family: ModelFamily,
    components: Components,
) -> list[Target]:  # fmt: skip
    """Which networks get an adapter, and where in them."""
    wanted = {"denoiser": run_adapter}
    if text_adapter is not None:
        wanted |= dict.fromkeys(components.text_encoders, text_adapter)
    targets = []
    for name, config in wanted.items():
        module = components.modules()[name]
        disk_prefix = family.denoiser if name == "denoiser" else name
        alpha = float(config.rank) if config.alpha is None else config.alpha
        presets = family.target_presets
        pattern = presets[config.targets][name] if config.targets in presets else config.targets
        targets.append(
            Target(
                disk_prefix=disk_prefix,
                module=module,
                method=config.method,
                shape=Shape(config.rank, alpha, config.dropout, pattern),
                learning_rate=config.learning_rate or learning_rate,
                disk_name=partial(canonical, module, disk_prefix),
            )
        )
    return targets


def build_adapters(run: Run, family: ModelFamily, components: Components) -> AdapterSet:
    """Attach fresh adapters as the run asks."""
    targets = build_targets(
        run.adapter, run.text_encoder_adapter, run.optimizer.learning_rate, family, components
    )
    return attach(targets, run.train.seed)
