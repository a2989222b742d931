"""Going on from an adapter file instead of a fresh adapter."""

from __future__ import annotations

from pathlib import Path

from finetune.adapters import AdapterFile, AdapterSet
from finetune.errors import CheckpointError, first_few
from finetune.sampling.merging import read_adapter

"""At most so many misfits are listed."""


def begin_from(path: Path, adapters: AdapterSet, base: Path | None = None) -> None:
    """Give the run's adapters the tensors of a file of any layout.

    Args:
        base: the base's pipeline folder; see `read_adapter`.

    Raises:
        CheckpointError: if the file's layers, methods, ranks or strengths are not this run's, listing each.
    """
    file = read_adapter(path, base)
    own = adapters.to_file(
        adapters.state(), family=file.header.family, base="", base_digest="", trigger_words=(), run_digest="", step=0
    )
    problems = _differences(file, own)
    if problems:
        raise CheckpointError(
            f"adapter.start_from={path} cannot be gone on from with this run's adapter:",
            first_few(problems),
        )
    adapters.load(file.tensors)


def _differences(file: AdapterFile, own: AdapterFile) -> list[str]:
    """What must be equal for tensors to mean the same."""
    problems = []
    for component in sorted({*file.header.method, *own.header.method}):
        there, here = file.header.method.get(component), own.header.method.get(component)
        if there != here:
            problems.append(f"{component}: the file's method is {there or 'none'}, this run's {here or 'none'}")
    if problems:
        return problems
    if file.header.tokens != own.header.tokens:
        problems.append(
            f"the file's words are {', '.join(file.header.tokens) or 'none'}, this run's "
            f"{', '.join(own.header.tokens) or 'none'} (tokens.words)"
        )
    theirs, ours = file.layers(), own.layers()
    problems += [f"{'.'.join(place)} is in the file, but not trained by this run" for place in theirs.keys() - ours]
    problems += [f"{'.'.join(place)} is trained by this run, but not in the file" for place in ours.keys() - theirs]
    for place in sorted(theirs.keys() & ours):
        shapes = [{suffix: tuple(t.shape) for suffix, t in layers[place].items()} for layers in (theirs, ours)]
        if shapes[0] != shapes[1]:
            problems.append(f"{'.'.join(place)}: the file has {shapes[0]}, this run {shapes[1]}; set the same rank")
        elif file.scale(*place) != own.scale(*place):
            problems.append(
                f"{'.'.join(place)}: the file's strength is {file.scale(*place):g}, this run's {own.scale(*place):g}; "
                "set alpha"
            )
    return problems
