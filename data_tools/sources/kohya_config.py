"""A dataset config of kohya's sd-scripts (`--dataset_config dataset.toml`): its subsets become one folder.

What a subset says about its pictures is followed; what it says about training is told, with the name it has in a
recipe here; anything else is refused by name.

Source: docs/config_README-en.md and library/config_util.py of kohya-ss/sd-scripts.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.captioners.columns import parse_columns
from data_tools.captioners.kohya import folder_name
from data_tools.errors import DataToolsError, Problem, RefusedError, UsageError, grouped, shown
from data_tools.files import read_regular
from data_tools.folder import list_folder
from data_tools.names import stem
from data_tools.sources.base import File, Order
from data_tools.text import MAX_CAPTION_BYTES, MAX_TEXT_BYTES, decode_text, split_captions

TABLES = ("general", "datasets")
FOLLOWED: dict[str, type] = {
    "image_dir": str, "num_repeats": int, "class_tokens": str, "is_reg": bool, "caption_extension": str,
    "caption_prefix": str, "caption_suffix": str, "metadata_file": str, "conditioning_data_dir": str,
}  # fmt: skip
"""Keys that decide which pictures there are and what they are called."""
IN_RECIPE = {
    "resolution": "data.resolution",
    "batch_size": "train.batch_size",
    "bucket_no_upscale": "data.upscale (its opposite)",
    "flip_aug": "data.flip",
    "color_aug": "data.color_jitter",
    "random_crop": "data.crop",
    "alpha_mask": "data.mask",
    "shuffle_caption": "data.shuffle_caption",
    "caption_separator": "data.caption_separator",
    "keep_tokens": "data.keep_tokens",
    "keep_tokens_separator": "data.keep_tokens_separator",
    "caption_dropout_rate": "data.caption_dropout",
    "caption_tag_dropout_rate": "data.tag_dropout",
    "prior_loss_weight": "data.prior.prior_loss_weight",
}
"""Keys about training that a recipe here has under another name."""
OF_TRAINING = (
    "secondary_separator", "enable_wildcard", "face_crop_aug_range", "caption_dropout_every_n_epochs",
    "token_warmup_min", "token_warmup_step", "cache_info", "enable_bucket", "min_bucket_reso", "max_bucket_reso",
    "bucket_reso_steps", "network_multiplier", "validation_split", "validation_seed", "custom_attributes",
    "resize_interpolation", "skip_image_resolution", "max_token_length", "debug_dataset",
)  # fmt: skip
"""Keys about training without a single counterpart; `finetune show RECIPE` lists the fields there are."""
DEFAULT_EXTENSION = ".caption"


@dataclass(frozen=True)
class Subset:
    """One picture folder of the config, with the settings that hold for it."""

    place: str
    """Where it stands: "datasets[0].subsets[1]"."""
    folder: Path
    target: str
    """Its folder in the new dataset."""
    settings: Mapping[str, Any]


class KohyaConfig:
    """`[[datasets]]` and `[[datasets.subsets]]`; settings of a subset win over its dataset's and the general ones."""

    summary = "a kohya dataset config (.toml)"

    def recognises(self, place: str) -> bool:
        """By its ending."""
        return place.lower().endswith(".toml") and Path(place).expanduser().is_file()

    def read(self, order: Order) -> Iterator[File | Problem]:
        """The pictures of all subsets, with captions, repeats, role and mask as columns."""
        document = _load(order.path)
        problems = list(_unknown(document))
        subsets = list(_subsets(document, order.path.parent, problems))
        errors = [problem for problem in problems if problem.severity == "error"]
        if errors:
            raise UsageError(f"{shown(order.place)} cannot be followed:", grouped(errors))
        yield from problems
        for subset in subsets:
            yield from _pictures(subset)


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(decode_text(read_regular(path, MAX_CAPTION_BYTES)))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{shown(str(path))} is not TOML: {error}; mend that place.") from error
    except RefusedError as refusal:
        raise UsageError(f"{shown(str(path))}: {refusal}.") from refusal


def _levels(document: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every table of the config under its place."""
    yield "general", document.get("general", {})
    for number, dataset in enumerate(document.get("datasets", [])):
        yield f"datasets[{number}]", {key: value for key, value in dataset.items() if key != "subsets"}
        for inner, subset in enumerate(dataset.get("subsets", [])):
            yield f"datasets[{number}].subsets[{inner}]", subset


def _unknown(document: Mapping[str, Any]) -> Iterator[Problem]:
    """Keys that are not followed: a note on those about training, an error on all others; wrong types too."""
    for key in document:
        if key not in TABLES:
            yield _error(key, "is no table of a dataset config", f"known are {' and '.join(TABLES)}", "remove it")
    if not _well_formed(document):
        yield _error("datasets", "is no list of tables", "subsets are read from [[datasets.subsets]]", "write them so")
        return
    known = (*FOLLOWED, *IN_RECIPE, *OF_TRAINING)
    told: dict[str, list[str]] = {}
    for place, table in _levels(document):
        for key, value in table.items():
            if key in FOLLOWED:
                if type(value) is not FOLLOWED[key] or (key == "num_repeats" and isinstance(value, int) and value < 1):
                    kind = "a whole number from 1 on" if FOLLOWED[key] is int else FOLLOWED[key].__name__
                    yield _error(f"{place}.{key}", f"is {value!r}", f"it must be {kind}", "write such a value")
            elif key in known:
                told.setdefault(f"{key} = {json.dumps(value, default=str)}", []).append(place)
            else:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]}?" if near else "remove it"
                yield _error(f"{place}.{key}", "is no key of a dataset config", "nothing would follow it", hint)
    for setting, places in told.items():
        field = IN_RECIPE.get(setting.split(" ", 1)[0])
        remedy = f"set {field} in the recipe" if field else "see what a recipe has for it: finetune show RECIPE"
        yield Problem(
            ", ".join(places), f"{setting} is not imported", "it is about training, not pictures", remedy, "note"
        )


def _well_formed(document: Mapping[str, Any]) -> bool:
    datasets = document.get("datasets")
    return (
        isinstance(document.get("general", {}), dict)
        and isinstance(datasets, list)
        and all(
            isinstance(dataset, dict)
            and isinstance(dataset.get("subsets", []), list)
            and all(isinstance(subset, dict) for subset in dataset.get("subsets", []))
            for dataset in datasets
        )
    )


def _error(place: str, what: str, why: str, remedy: str) -> Problem:
    return Problem(place, what, why, remedy)


def _subsets(document: Mapping[str, Any], beside: Path, problems: list[Problem]) -> Iterator[Subset]:
    if not _well_formed(document):
        return
    taken: Counter[str] = Counter()
    for number, dataset in enumerate(document["datasets"]):
        if not dataset.get("subsets"):
            problems.append(_error(f"datasets[{number}]", "has no subsets", "they name the pictures", "add one"))
        for inner, table in enumerate(dataset.get("subsets", [])):
            place = f"datasets[{number}].subsets[{inner}]"
            settings = {**document.get("general", {}), **dataset, **table}
            folder = _folder(settings.get("image_dir"), beside)
            if folder is None:
                problems.append(
                    _error(
                        f"{place}.image_dir",
                        f"is {settings.get('image_dir')!r}, and there is no such folder",
                        f"it is looked for here and beside the config, in {beside}",
                        "write the path of the pictures' folder",
                    )
                )
                continue
            name = folder_name(folder.resolve().name) or "pictures"
            taken[name.casefold()] += 1
            count = taken[name.casefold()]
            yield Subset(place, folder, name if count == 1 else f"{name}-{count}", settings)


def _folder(written: object, beside: Path) -> Path | None:
    """Paths are relative to where the command runs, as for kohya's scripts, or to the config."""
    if not isinstance(written, str) or not written:
        return None
    path = Path(written).expanduser()
    return next((place for place in (path, beside / path) if place.is_dir()), None)


def _pictures(subset: Subset) -> Iterator[File | Problem]:
    listing = list_folder(subset.folder)
    rows, problems = _metadata(subset, listing.pictures)
    yield from problems
    conditions = _conditions(subset)
    for name in listing.pictures:
        if "/" in name:
            yield Problem(
                f"{subset.target}/{name}", "is left aside (in a subfolder)", "kohya's subsets are one level deep",
                "add a subset for its folder", "note",
            )  # fmt: skip
            continue
        columns: dict[str, Any] = {
            "role": "class" if subset.settings.get("is_reg") else "instance",
            "repeats": subset.settings.get("num_repeats", 1),
        }
        try:
            caption = rows.get(name) or _sidecar(subset, name) or subset.settings.get("class_tokens", "").strip()
        except RefusedError as refusal:
            yield refusal.problem(f"{subset.target}/{stem(name)}{_extension(subset)}")
            continue
        if caption:
            prefix, suffix = (subset.settings.get(f"caption_{end}") for end in ("prefix", "suffix"))
            lines = [" ".join(word for word in (prefix, line, suffix) if word) for line in caption.splitlines()]
            columns["text"] = "\n".join(lines)
        mask = conditions.get(stem(name)) or listing.masks.get(name)
        if mask is not None:
            path = listing.root / mask
            target = f"masks/{subset.target}/{PurePosixPath(name).stem}{path.suffix}"
            columns["mask_file_name"] = target
            yield File(target, path)
        yield File(f"{subset.target}/{name}", listing.root / name, columns)


def _extension(subset: Subset) -> str:
    return str(subset.settings.get("caption_extension", DEFAULT_EXTENSION))


def _sidecar(subset: Subset, name: str) -> str:
    """The captions beside a picture, one a line; empty when there is no such file."""
    path = (subset.folder / name).with_suffix("")
    path = path.with_name(path.name + _extension(subset))
    if not path.is_file():
        return ""
    return "\n".join(split_captions(decode_text(read_regular(path, MAX_CAPTION_BYTES))))


def _metadata(subset: Subset, pictures: Sequence[str]) -> tuple[dict[str, str], list[Problem]]:
    """Captions of a fine-tuning subset: {"cat" or a path: {"caption": ..., "tags": ...}} in a JSON file."""
    written = subset.settings.get("metadata_file")
    if not written:
        return {}, []
    path = next((p for p in (Path(written).expanduser(), subset.folder / written) if p.is_file()), None)
    if path is None:
        raise DataToolsError(f"{subset.place}.metadata_file = {written!r} is not there; write its path.")
    try:
        document = json.loads(decode_text(read_regular(path, MAX_TEXT_BYTES)))
    except (ValueError, RecursionError, RefusedError) as error:
        raise DataToolsError(f"{shown(str(path))} cannot be read ({error}); make it again.") from error
    by_stem = {stem(name): name for name in pictures}
    captions, problems = {}, []
    for key, values in (document if isinstance(document, dict) else {}).items():
        name = by_stem.get(stem(PurePosixPath(key).name)) or by_stem.get(PurePosixPath(key).name)
        try:
            if name is None:
                raise RefusedError("names no picture of the folder", "its caption has no use", "remove it, or the rest")
            if not isinstance(values, dict):
                raise RefusedError(f"holds {type(values).__name__}", "caption and tags have names", "mend it")
            captions[name] = "\n".join(parse_columns(values, "metadata", str).captions)
        except RefusedError as refusal:
            problems.append(refusal.problem(f"{path.name}: {key}", "error" if name else "warning"))
    return captions, problems


def _conditions(subset: Subset) -> dict[str, Path]:
    """The masks of kohya's masked loss, by stem."""
    folder = _folder(subset.settings.get("conditioning_data_dir"), subset.folder)
    if folder is None:
        return {}
    listing = list_folder(folder)
    return {stem(name): listing.root / name for name in listing.pictures}
