"""From a `Run` to what is trained."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn

from finetune.adapters import (
    EVERYTHING,
    METHODS,
    AdapterSet,
    Block,
    Shape,
    Target,
    Wish,
    WordTarget,
    add_words,
    attach,
    count_vectors,
    plan_layers,
)
from finetune.config import EncoderConfig, NetworkAdapterConfig, Run, TextAdapterConfig, TokensConfig
from finetune.errors import ConfigError, nearest
from finetune.families import Components, ModelFamily
from finetune.families.places import names_folder
from finetune.families.text import canonical
from finetune.sampling.merging import merge_first
from finetune.training.start_from import begin_from


def build_adapters(run: Run, family: ModelFamily, components: Components, *, fresh: bool = True) -> AdapterSet:
    """Attach what the run trains; the networks stay as they were in what they say, but for `merge_first`.

    Args:
        fresh: whether the run begins, so that adapter.start_from counts.

    Raises:
        ConfigError: for every layer, word or setting that does not fit the base, all at once.
        CheckpointError: if a file to merge or to start from is damaged or does not fit.
    """
    names = names_folder(run.model.base)
    merged = merge_first(run.adapter.merge_first, family, components, names) if run.adapter else []
    rate = run.optimizer.learning_rate
    targets, problems = build_targets(run.adapter, run.text_encoder_adapter, rate, family, components)
    words: list[WordTarget] = []
    if run.tokens is not None:
        words, more = build_words(run.tokens, rate, components)
        problems += more
    if problems:
        raise ConfigError("The adapter cannot be attached:", problems)
    adapters = attach(targets, run.train.seed, words, {"merged_first": merged} if merged else {})
    if fresh and run.adapter and run.adapter.start_from is not None:
        begin_from(run.adapter.start_from, adapters, names)
    return adapters


def build_targets(
    adapter: NetworkAdapterConfig | None, text_adapter: TextAdapterConfig | None, learning_rate: float,
    family: ModelFamily, components: Components,
) -> tuple[list[Target], list[str]]:  # fmt: skip
    """Which layers of which networks are changed, and everything that cannot be done, in words."""
    targets, problems = [], []
    for name, section, config in _wanted(adapter, text_adapter, family, components):
        module = components.modules()[name]
        disk_prefix = family.denoiser if name == "denoiser" else name
        disk_name = partial(canonical, module, disk_prefix)
        wish = _wish(section, config, learning_rate, family, name, module)
        layers, more = plan_layers(wish, disk_prefix, module, disk_name)
        problems += more
        share = text_adapter.train_share if text_adapter is not None and name != "denoiser" else 1.0
        targets.append(Target(disk_prefix, module, config.method, wish.shape, layers, disk_name, share))
    unknown = [name for name in (text_adapter.per_encoder if text_adapter else {}) if name not in family.text_encoders]
    problems += [
        f"text_encoder_adapter.per_encoder names {name}{nearest(name, family.text_encoders)}; "
        f"{family.name} has {', '.join(family.text_encoders)}"
        for name in unknown
    ]
    if text_adapter is not None and not any(target.disk_prefix != family.denoiser for target in targets):
        problems.append(
            "text_encoder_adapter.per_encoder leaves every text encoder frozen; set text_encoder_adapter=null instead"
        )
    return targets, problems


def _wanted(
    adapter: NetworkAdapterConfig | None,
    text_adapter: TextAdapterConfig | None,
    family: ModelFamily,
    components: Components,
) -> Iterator[tuple[str, str, NetworkAdapterConfig]]:
    """(network, configuration section, settings) of every network that gets an adapter."""
    if adapter is not None:
        yield "denoiser", "adapter", adapter
    if text_adapter is None:
        return
    for name in components.text_encoders:
        usual = EncoderConfig() if name in family.usual_encoders() else None
        own = text_adapter.per_encoder.get(name, usual)
        if own is not None:
            changes = own.model_dump(exclude_none=True)
            if own.rank is not None and own.alpha is None and text_adapter.alpha is not None:
                changes["alpha"] = text_adapter.alpha / text_adapter.rank * own.rank
            yield name, "text_encoder_adapter", text_adapter.model_copy(update=changes)


def _wish(
    section: str, config: NetworkAdapterConfig, learning_rate: float, family: ModelFamily, name: str, module: nn.Module
) -> Wish:
    """The configuration of one network in the adapters' own terms."""
    asked = config.targets or METHODS[config.method].targets
    if asked == EVERYTHING:
        unread = family.unread(name, module)
        pattern = f"(?!{unread}).*" if unread else ".*"
    else:
        pattern = family.targets(asked, name, module)
    alpha = float(config.rank) if config.alpha is None else config.alpha
    conv = None
    if config.conv_rank is not None or config.conv_alpha is not None:
        conv = Block("", config.conv_rank, config.conv_alpha)
    return Wish(
        section=section,
        targets=asked,
        pattern=pattern,
        method=config.method,
        shape=Shape(
            config.rank, alpha, config.dropout, config.init, config.lora_plus_ratio, config.lokr_factor, config.tucker
        ),
        learning_rate=config.learning_rate or learning_rate,
        conv=conv,
        blocks=[Block(b.pattern, b.rank, b.alpha, b.learning_rate) for b in config.blocks],
    )


def build_words(
    tokens: TokensConfig, learning_rate: float, components: Components
) -> tuple[list[WordTarget], list[str]]:
    """Teach the tokenizers the words; what each text encoder learns, and everything that is in the way, in words."""
    chosen = list(components.text_encoders) if tokens.text_encoders is None else list(tokens.text_encoders)
    unknown = [name for name in chosen if name not in components.text_encoders]
    if unknown or not chosen:
        known = ", ".join(components.text_encoders)
        return [], [
            f"tokens.text_encoders names {', '.join(unknown) or 'none'}; choose some of {known}, or null for all"
        ]
    first = components.tokenizers[chosen[0]]
    vectors = {word: tokens.vectors or count_vectors(first, text) for word, text in tokens.words.items()}
    problems = [
        f"tokens.words: {text!r}, where {word} starts, is no text to the base's tokenizer; write ordinary words"
        for word, text in tokens.words.items()
        if not count_vectors(first, text)
    ]
    if problems:
        return [], problems
    targets = []
    for name in chosen:
        problems += add_words(components.tokenizers[name], vectors)
        targets.append(
            WordTarget(
                disk_prefix=name,
                encoder=components.text_encoders[name],
                tokenizer=components.tokenizers[name],
                initial=tokens.words,
                vectors=vectors,
                learning_rate=tokens.learning_rate or learning_rate,
                train_share=tokens.train_share,
                norm_pull=tokens.norm_pull,
            )
        )
    return targets, problems
