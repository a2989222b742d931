"""`Adapter` -> tensors and metadata of each layout. What a layout cannot say is refused with the reason.

Key names are the canonical ones (text encoders carry `text_model.`), so the files do not depend on the installed
transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from finetune.adapters.files import HEADER_KEY, VERSION, AdapterFile, AdapterHeader
from finetune.interchange.adapter import Adapter, InterchangeError, Update
from finetune.interchange.carrying import remedies
from finetune.interchange.kohya import write_kohya
from finetune.interchange.output import (
    Output,
    cast,
    folded,
    kept_metadata,
    methods,
    portable,
    refuse,
    refuse_words_alone,
    target_endings,
    usual,
)
from finetune.interchange.sources import DIFFUSERS_SETTINGS, PEFT_CONFIG, PEFT_WEIGHTS

PEFT_TYPES = {
    "lora": "LORA",
    "dora": "LORA",
    "loha": "LOHA",
    "lokr": "LOKR",
    "oft": "OFT",
    "boft": "BOFT",
    "ia3": "IA3",
}
"""Method -> the kind of adapter that PEFT calls so."""


def write_diffusers(adapter: Adapter, dtype: torch.dtype, lossy: bool) -> Output:
    """One file with PEFT keys for `pipeline.load_lora_weights`; strength is folded in, so that alpha = rank.

    Source: diffusers 0.42 loaders/lora_pipeline.py; see docs/decisions.md for why nothing else is written.
    """
    refuse(adapter, remedies("diffusers"))
    refuse_words_alone(adapter)
    tensors: dict[str, Tensor] = {}
    settings: dict[str, object] = {}
    for component in adapter.components():
        ranks: dict[str, int] = {}
        for module, update in adapter.of(component):
            plain = folded(update, None)
            ranks[portable(module)] = plain.tensors["lora_A.weight"].shape[0]
            for part, tensor in plain.tensors.items():
                # keep: transformers loses magnitudes under their bare name, diffusers reads them only under that.
                magnitude = part == "lora_magnitude_vector" and component.startswith("text_encoder")
                tensors[f"{component}.{module}.{part}{'.weight' if magnitude else ''}"] = tensor
        rank, pattern = usual(ranks)
        settings |= {
            f"{component}.r": rank,
            f"{component}.lora_alpha": rank,
            f"{component}.target_modules": target_endings(adapter, component),
            **({f"{component}.rank_pattern": pattern, f"{component}.alpha_pattern": pattern} if pattern else {}),
            **({f"{component}.use_dora": True} if "dora" in methods(adapter, component) else {}),
        }
    metadata = {**kept_metadata(adapter), DIFFUSERS_SETTINGS: json.dumps(settings, sort_keys=True)}
    return Output({"": (cast(tensors, dtype), metadata)})


def write_peft(adapter: Adapter, dtype: torch.dtype, lossy: bool) -> Output:
    """A folder per network for `PeftModel.from_pretrained`, with the strength in adapter_config.json.

    The one layout with the installed library's names, because PEFT adds and strips nothing: a plain CLIP text encoder
    has no `text_model.` in transformers 5.6 and later; one with a projection has.
    """
    refuse(adapter, remedies("peft"))
    refuse_words_alone(adapter)
    mixed = {component: found for component, found in adapter.methods().items() if len(found) > 1}
    if mixed:
        raise InterchangeError(
            "PEFT supports one method per network.",
            [
                f"{component} has {' and '.join(sorted(found))}; use --to kohya."
                for component, found in mixed.items()
            ],
        )
    written = Output({})
    for component in adapter.components():
        tensors = {
            f"base_model.model.{_installed(adapter, component, module)}.{part}": tensor
            for module, update in adapter.of(component)
            for part, tensor in update.tensors.items()
        }
        config = _peft_config(adapter, component)
        written.files[f"{component}/{PEFT_WEIGHTS}"] = (cast(tensors, dtype), kept_metadata(adapter))
        written.documents[f"{component}/{PEFT_CONFIG}"] = dict(sorted(config.items()))
    return written


def write_ours(adapter: Adapter, dtype: torch.dtype, lossy: bool) -> Output:
    """This toolkit's own adapter file, for `finetune export`, `finetune train` and the report; always fp32."""
    file = to_file(adapter)
    header = {"version": VERSION, **asdict(file.header)}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return Output({"": (file.tensors, {**kept_metadata(adapter), HEADER_KEY: text})})


INSTEAD = "use --to kohya, or `finetune merge FILE --into BASE` to sample with it"
ONLY_MERGED = {
    "diff": f"a full weight difference needs the base model; {INSTEAD}",
    "diag-oft": f"LyCORIS' rotations of outputs are not supported; {INSTEAD}",
}
"""Method of other trainers -> why it is no adapter of this toolkit, and what is done with it."""


def to_file(adapter: Adapter) -> AdapterFile:
    """The same adapter as the value that export and sampling take.

    Raises:
        InterchangeError: if a network has several methods, or one that this toolkit neither trains nor draws with.
    """
    refuse(adapter, ONLY_MERGED)
    problems = [
        f"{name} has {' and '.join(sorted(found))}." for name, found in adapter.methods().items() if len(found) > 1
    ]
    if problems:
        raise InterchangeError("This toolkit's adapters have one method per network; use --to kohya.", problems)
    method = {component: next(iter(found)) for component, found in adapter.methods().items()}
    rank: dict[str, int] = {}
    alpha: dict[str, float] = {}
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    options: dict[str, object] = {}
    tensors: dict[str, Tensor] = {}
    for component in adapter.components():
        ranks = {module: update.rank or 1 for module, update in adapter.of(component)}
        alphas = {module: update.scale * ranks[module] for module, update in adapter.of(component)}
        rank[component], different = usual(ranks)
        alpha[component], unlike = usual(alphas)
        rank_pattern |= {f"{component}.{module}": value for module, value in different.items()}
        alpha_pattern |= {f"{component}.{module}": value for module, value in unlike.items()}
        for module, update in adapter.of(component):
            options |= update.options
            tensors |= {f"{component}.{module}.{part}": tensor for part, tensor in update.tensors.items()}
    for number, vectors in enumerate(adapter.tokens.values()):
        tensors |= {f"{component}.token_embedding.{number}": vector for component, vector in vectors.items()}
    stated = adapter.metadata
    triggers = [word.strip() for word in stated.get("modelspec.trigger_phrase", "").split(",")]
    header = AdapterHeader(
        family=adapter.architecture.family,
        base=stated.get("finetune.base") or stated.get("ss_sd_model_name", ""),
        base_digest=stated.get("finetune.base_digest", ""),
        method=method, rank=rank, alpha=alpha,
        trigger_words=tuple(word for word in triggers if word),
        run_digest=stated.get("finetune.run_digest", ""),
        step=int(step) if (step := stated.get("finetune.step") or stated.get("ss_steps", "0")).isdigit() else 0,
        tokens=tuple(adapter.tokens), rank_pattern=rank_pattern, alpha_pattern=alpha_pattern, options=dict(options),
    )  # fmt: skip
    if own := stated.get(HEADER_KEY):
        known = json.loads(own)
        kept = {key: known[key] for key in ("base", "base_digest", "run_digest", "step") if key in known}
        header = AdapterHeader(**{**vars(header), **kept, "trigger_words": tuple(known.get("trigger_words", ()))})
    return AdapterFile(tensors, header)


WRITERS: dict[str, Callable[[Adapter, torch.dtype, bool], Output]] = {
    "kohya": write_kohya,
    "diffusers": write_diffusers,
    "peft": write_peft,
    "ours": write_ours,
}
"""Layout -> how an adapter is put in it; what `finetune convert --to` offers."""


def _installed(adapter: Adapter, component: str, module: str) -> str:
    return module if "text_projection" in adapter.architecture.networks[component].layers else portable(module)


def _peft_config(adapter: Adapter, component: str) -> dict[str, object]:
    updates = dict(adapter.of(component))
    method = next(iter(updates.values())).method
    config: dict[str, object] = {
        "peft_type": PEFT_TYPES[method],
        "base_model_name_or_path": adapter.metadata.get("finetune.base", ""),
        "inference_mode": True,
        "target_modules": target_endings(adapter, component),
        "task_type": None,
    }
    if method == "ia3":
        # keep: PEFT wants every entry of feedforward_modules to be one of target_modules too, letter for letter.
        scaled_in = target_endings(adapter, component, _scales_inputs)
        scaled_out = target_endings(adapter, component, lambda update: not _scales_inputs(update))
        return config | {"target_modules": sorted({*scaled_in, *scaled_out}), "feedforward_modules": scaled_in}
    if method in ("oft", "boft"):
        return config | _rotation_config(method, updates)
    ranks = {portable(module): update.rank or 1 for module, update in updates.items()}
    alphas = {portable(module): update.scale * (update.rank or 1) for module, update in updates.items()}
    rank, rank_pattern = usual(ranks)
    alpha, alpha_pattern = usual(alphas)
    named = {"lora": "lora_alpha", "dora": "lora_alpha"}.get(method, "alpha")
    config |= {"r": rank, named: alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    if method in ("lora", "dora"):
        return config | {"use_dora": method == "dora", "use_rslora": False, "bias": "none", "fan_in_fan_out": False}
    whole = any("lokr_w1" in update.tensors for update in updates.values())
    conv = any(key in update.tensors for update in updates.values() for key in ("hada_t1", "lokr_t2"))
    return config | {"use_effective_conv2d": conv} | ({"decompose_both": not whole} if method == "lokr" else {})


def _scales_inputs(update: Update) -> bool:
    return update.tensors["ia3_l"].shape[0] == 1


def _rotation_config(method: str, updates: Mapping[str, Update]) -> dict[str, object]:
    first = next(iter(updates.values()))
    if method == "boft":
        return {"boft_block_size": first.tensors["boft_R"].shape[-1], "boft_n_butterfly_factor": 1}
    width = first.tensors["oft_R.weight"].shape[1]
    terms = first.options.get("cayley_terms", 0)
    return {
        "oft_block_size": round((1 + (1 + 8 * width) ** 0.5) / 2), "r": 0,
        "use_cayley_neumann": bool(terms), "num_cayley_neumann_terms": terms or 5,
    }  # fmt: skip
