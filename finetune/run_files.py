"""From what the user names (recipe, YAML, JSON, run folder, built-in recipe) to a checked `Run`."""

from __future__ import annotations

import json
import re
import runpy
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from finetune.config import Run, flatten
from finetune.errors import CheckpointError, ConfigError, UserError, nearest
from finetune.version import VERSION

Model = TypeVar("Model", bound=BaseModel)

RUN_FILE = "run.json"
"""The resolved run, in its folder."""
WRITTEN_BY = "finetune"
"""The version in that file."""
ADAPTER_FILE = "adapter.safetensors"
"""The finished adapter, beside it."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and truth, no duplicate keys; PyYAML alone reads 1e-4 as text, 10:30 as 630, off as false."""


SCALARS = {
    "tag:yaml.org,2002:bool": r"^(true|True|TRUE|false|False|FALSE)$",
    # keep: the first matching pattern wins, so whole numbers stand in front of the wider pattern.
    "tag:yaml.org,2002:int": r"^[-+]?(0|[1-9]\d*)$",
    "tag:yaml.org,2002:float": r"^([-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in {*SCALARS, "tag:yaml.org,2002:timestamp"}]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in SCALARS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+0123456789.tTfF"))


def _unique_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    keys = [loader.construct_object(key, deep=deep) for key in own]
    for place, key in zip(own, keys, strict=True):
        if keys.index(key) != own.index(place):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", place.start_mark)
    return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)


PEER_NAMES = {
    "lr": "learning_rate",
    "network_dim": "rank",
    "dim": "rank",
    "network_alpha": "alpha",
    "max_train_steps": "steps",
    "num_steps": "steps",
    "train_batch_size": "batch_size",
    "lr_scheduler": "schedule",
    "lr_warmup_steps": "warmup_steps",
    "pretrained_model_name_or_path": "base",
    "instance_data_dir": "folder",
    "train_data_dir": "folder",
    "min_snr_gamma": "snr_gamma",
    "mixed_precision": "dtype",
}
"""What other trainers call our fields; used for hints only."""


def recipes_folder() -> Path:
    """The recipes shipped with the toolkit: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    packaged = package / "recipes"
    return packaged if packaged.is_dir() else package.parent / "recipes"


def recipe_names() -> dict[str, Path]:
    """Built-in recipes by the name `finetune init` takes, e.g. {"sd15-lora": .../sd15_lora.py}."""
    return {path.stem.replace("_", "-"): path for path in sorted(recipes_folder().glob("*.py"))}


def load_run(source: str | Path, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Run:
    """Read a run and apply `section.field=value` overrides.

    Args:
        source: a recipe (.py with a RUN), a .yaml, .yml or .json file, a run folder, or a built-in recipe's name.
        overrides: e.g. ["adapter.rank=32", "data.prior=null"]; values are YAML.
        values: the same from Python, e.g. {"adapter.rank": 32}.

    Raises:
        ConfigError: listing every problem of the file and of the overrides at once.
    """
    return _changed(*_read(Path(source)), overrides, values)


def load_run_folder(folder: Path) -> Run:
    """The run that was started in a folder.

    Raises:
        ConfigError: if `folder` is none of a run, with the nearest that is.
    """
    if not folder.is_dir():
        there = [str(file.parent) for place in {folder.parent, Path("runs")} for file in place.glob(f"*/{RUN_FILE}")]
        hint = nearest(str(folder), there) or "; name the output_dir of a run"
        raise ConfigError(f"There is no run folder at {folder}{hint}.")
    return load_run(folder)


def finished_adapter(folder: Path) -> Path:
    """The adapter that the run in a folder finished.

    Raises:
        CheckpointError: if there is none.
    """
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {ADAPTER_FILE}: its run is not finished; resume it with `finetune train {folder}`."
        )
    return path


def change_run(run: Run, overrides: Sequence[str]) -> Run:
    """The run with `section.field=value` overrides applied.

    Raises:
        ConfigError: listing every problem at once.
    """
    return _changed(dump_run(run), "The recipe", overrides, None)


def _changed(
    document: dict[str, Any], label: str, overrides: Sequence[str], values: Mapping[str, Any] | None
) -> Run:
    problems = []
    for override in overrides:
        problems += _override(document, override)
    for key, value in (values or {}).items():
        problems += _put(document, key, value)
    try:
        run = make_run(document, label)
    except ConfigError as error:
        raise ConfigError(error.headline, [*problems, *error.problems]) from None
    if problems:
        raise ConfigError("The command line has mistakes:", problems)
    return run


def make_run(document: dict[str, Any], label: str = "run") -> Run:
    """Validate a nested document into a `Run`; `label` names its origin in messages."""
    written = document.get(WRITTEN_BY, VERSION)
    try:
        return Run.model_validate({key: value for key, value in document.items() if key != WRITTEN_BY})
    except ValidationError as error:
        other = f"it was made with finetune {written}, and this is {VERSION}: use that version, or begin another run"
        problems = [*_explain(error), *([other] if written != VERSION else [])]
        raise ConfigError(f"{label} cannot be run:", problems) from None


def dump_run(run: Run) -> dict[str, Any]:
    """A JSON document that `make_run` reads back to an equal `Run`."""
    return run.model_dump(mode="json")


def run_record(run: Run) -> dict[str, Any]:
    """The same with the version of this toolkit, for a run folder."""
    return {WRITTEN_BY: VERSION, **dump_run(run)}


def _read(source: Path) -> tuple[dict[str, Any], str]:
    """The document behind `source` and the name to use for it in messages."""
    builtin = recipe_names()
    if not source.exists() and str(source) in builtin:
        source = builtin[str(source)]
    if source.is_dir() and (source / RUN_FILE).is_file():
        # keep: a run folder may have been moved since; the one that was named is meant.
        return read_document(source / RUN_FILE) | {"output_dir": str(source)}, str(source)
    if source.is_dir():
        remedy = f"if it holds your pictures, use `finetune train sd15-lora --set data.folder={source}`"
        raise ConfigError(f"{source} is a folder without {RUN_FILE}, so no run was started there.", [remedy])
    if not source.is_file():
        begin = f"; `finetune init sd15-lora > {source}` creates one to start from" if source.suffix else ""
        hint = nearest(str(source), builtin) or begin or f"; built-in recipes are {', '.join(builtin) or 'none'}"
        raise ConfigError(f"There is no recipe or run at {source}{hint}.")
    if source.suffix == ".py":
        return dump_run(_recipe_value(source)), source.name
    return read_document(source), source.name


def read_document(source: Path) -> dict[str, Any]:
    """The sections of a YAML or JSON file (JSON is YAML)."""
    try:
        document = yaml.load(source.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} cannot be read:", [f"it is not UTF-8 text ({error.reason})"]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{source} cannot be read:", [f"line {mark.line + 1}: {what}" if mark else what]) from None
    if not isinstance(document, dict):
        raise ConfigError(f"{source} holds no sections; `finetune init sd15-lora` prints a file to start from.")
    return document


def _recipe_value(path: Path) -> Run:
    try:
        value = runpy.run_path(str(path)).get("RUN")
    except ValidationError as error:
        raise ConfigError(f"{path.name} cannot be run:", list(_explain(error))) from None
    except UserError:
        raise
    except Exception as error:  # whatever a person's Python file raises; where and what, without our own frames
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = getattr(error, "lineno", None) or (frames[-1] if frames else None)
        where = f"line {line}: " if line else ""
        raise ConfigError(f"{path} cannot be run:", [f"{where}{type(error).__name__}: {error}"]) from error
    if not isinstance(value, Run):
        raise ConfigError(f"{path} defines no RUN; a recipe is a Python file with RUN = Run(...).")
    return value


def _override(document: dict[str, Any], override: str) -> list[str]:
    """Apply one `a.b=value` in place; the problems it has, in words."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        return [f"--set {override}: write section.field=value, e.g. --set adapter.rank=32"]
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        value = text
    return _put(document, key.strip(), value)


def _put(document: dict[str, Any], key: str, value: Any) -> list[str]:
    """Set one dotted field in place; the problems it has, in words."""
    *sections, last = key.split(".")
    place = document
    for section in sections:
        inner = place.setdefault(section, {})
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            return [f"{key}: {section} is a value, not a section"]
        place = inner
    place[last] = value
    return []


def checked(section: type[Model], values: dict[str, Any]) -> Model:
    """A section of a run from values given on a command line.

    Raises:
        ConfigError: naming every field that is wrong.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError("These settings cannot be used:", list(_explain(error))) from None


def change_section(section: Model, name: str, overrides: Sequence[str], fields: Sequence[str]) -> Model:
    """A section of a run with `name.field=value` overrides applied, for which only some fields are offered.

    Raises:
        ConfigError: listing every problem at once.
    """
    document, known = {name: section.model_dump(mode="json")}, [f"{name}.{field}" for field in fields]
    problems = []
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in known or key.startswith(tuple(f"{field}." for field in known)):
            problems += _override(document, override)
        else:
            problems.append(f"--set {override}: {key} cannot be set here{nearest(key, known)}")
    if problems:
        raise ConfigError("The command line has mistakes:", [*problems, f"fields that can be set: {', '.join(known)}"])
    return checked(type(section), document[name])


def _explain(error: ValidationError) -> Iterator[str]:
    """Each problem pydantic found, with the place, the value and what would be right."""
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        kind = item["type"]
        if kind == "extra_forbidden":
            yield f"{place}: there is no such field{_suggestion(item['loc'])}"
        elif kind == "missing" and isinstance(item["loc"][-1], int):
            yield f"{place.rpartition('.')[0]} has too few values: number {item['loc'][-1] + 1} is missing"
        elif kind == "missing":
            yield f"{place} is missing: {_meaning(item['loc'])}"
        elif kind == "value_error" and not place:
            yield from str(item["ctx"]["error"]).splitlines()
        else:
            yield f"{place}={_shown(item['input'])}: {_wish(item)}"


WISHES = {
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
    "string": "must be text; put it in quotes",
    "path": "must be a path",
    "tuple": "must be a list: [first, second]",
    "list": "must be a list: [first, second]",
    "dict": "must be a mapping: {{name: value}}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "too_short": "must hold at least {min_length}",
    "too_long": "must hold at most {max_length}",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must look like {pattern}",
}
"""What pydantic found wrong, by its name or the part of it before _type, _parsing or _from -> what would be right."""


def _wish(item: Any) -> str:
    """What would be right in place of what pydantic refused."""
    kind, context = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", context["expected"])
        return f"is not known{nearest(str(item['input']), known)}; choose one of {', '.join(known)}"
    if kind in ("model_type", "model_attributes_type"):
        section = _walk((*item["loc"], ""))
        fields = ", ".join(list(section.model_fields)[:3]) if section else ""
        return f"is a section; set its fields one by one ({fields}, ...)"
    words = WISHES.get(kind) or WISHES.get(re.sub(r"_(type|parsing|from).*", "", kind))
    if words is not None:
        return words.format(**context)
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}"


def _shown(value: Any) -> str:
    """A value as the user would write it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def fields_of(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """Field names of a section, each with the section it opens, if it opens one."""
    return {name: _section_type(info.annotation) for name, info in model.model_fields.items()}


def _section_type(annotation: Any) -> type[BaseModel] | None:
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _walk(location: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The section that holds the last part of `location`."""
    model: type[BaseModel] | None = Run
    for part in location[:-1]:
        field = model.model_fields.get(str(part)) if model else None
        if field is not None:  # if not, it is a place in a list or a key of a mapping
            model = next(_sections_in(field.annotation), None)
    return model


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every section that a field's type mentions, inside lists and mappings too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)


def _suggestion(location: tuple[int | str, ...]) -> str:
    model, last = _walk(location), str(location[-1])
    last = PEER_NAMES.get(last, last)
    fields = list(model.model_fields) if model else []
    elsewhere = [key for key in flatten(_example()) if key.rsplit(".", 1)[-1] == last]
    if last not in fields and elsewhere:
        return f" (did you mean {elsewhere[0]}?)"
    return nearest(last, fields) or f"; known here: {', '.join(fields)}"


def _example() -> Run:
    """A complete run with every optional section open, to look field names up in."""
    prior = {"prompts": ["a dog"]}
    sections = {"model": {"base": "demo"}, "data": {"folder": "pictures", "prior": prior}, "text_encoder_adapter": {}}
    return Run.model_validate({**sections, "output_dir": "runs/example"})


def _meaning(location: tuple[int | str, ...]) -> str:
    model = _walk(location)
    info = model.model_fields.get(str(location[-1])) if model else None
    return " ".join((info.description or "a section").split()) if info else "a value is needed"
