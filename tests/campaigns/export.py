"""Families x methods x formats: what is written, what it loses on the way back, what is refused; docs/conformance.md.

    python -m tests.campaigns.export [FAMILY ...]

Every cell is exported for real on the tiny twins and read back by the format's readers.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from finetune.adapters import METHODS, AdapterFile, Shape, Target, Wish, attach, plan_layers
from finetune.errors import UserError
from finetune.export.exporting import FORMATS, Exported, export
from finetune.families import load_family
from finetune.families.base import Components, ModelFamily
from finetune.families.text import canonical
from finetune.families.twins import TWINS, write_twin

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "conformance.md"
SIZE = 0.02
"""Standard deviation of what stands in for training."""
HEAD = """# What each format carries

Written by `python -m tests.campaigns.export` on the tiny twins of every family (the real classes at toy size), fp32. A
figure is the largest relative difference, over all readers of the format, of the model's outputs after the file was
read back, against the live adapter. Adapters change attention (locon: every layer; full: every weight) of the denoiser
and of the text encoders that are trained by default. Numbers in brackets are explained below the table.
"""
LOSSY = "kohya --allow-lossy"


def trained(family: ModelFamily, components: Components, method: str) -> AdapterFile:
    """An adapter of a method with noise in every tensor, as a run would leave it; the networks are changed by it."""
    targets = []
    for component in (family.denoiser, *family.usual_encoders()):
        denoiser = component == family.denoiser
        module = components.denoiser if denoiser else components.text_encoders[component]

        def disk_name(name: str, module=module, component=component) -> str:
            return canonical(module, component, name)

        preset = METHODS[method].targets
        pattern = family.targets(preset, "denoiser" if denoiser else component, module)
        pattern = ".*" if pattern == "everything" else pattern
        alpha = 3.0 if METHODS[method].per_layer else 4.0
        wish = Wish("adapter", preset, pattern, method, Shape(4, alpha), 1e-3)
        layers, problems = plan_layers(wish, component, module, disk_name)
        assert not problems, problems
        targets.append(Target(component, module, method, wish.shape, layers, disk_name))
    adapters = attach(targets, seed=0)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapters.named_parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * SIZE)
    return adapters.to_file(
        adapters.state(), family=family.name, base=components.source, base_digest=components.digest,
        trigger_words=("sks toy",), run_digest="ab" * 32, step=100,
    )  # fmt: skip


def cases(folder: Path, family: str, method: str, formats: tuple[str, ...]) -> Iterator[tuple[str, Exported | str]]:
    """(format, what was written or why not)."""
    file = trained(*load_family(str(folder)), method)
    base = load_family(str(folder))
    for name in formats:
        with tempfile.TemporaryDirectory() as output:
            lossy = 8 if name == LOSSY else None
            try:
                (done,) = export(file, *base, Path(output), name="toy", formats=[name.split(" ")[0]], lossy=lossy)
                yield name, done
            except UserError as error:
                yield name, " ".join([str(error).splitlines()[0], *error.problems])


def main() -> None:
    """Fill the table."""
    formats = (*(name for name in FORMATS if name != "embeddings"), LOSSY)
    head = [f"| method | {' | '.join(formats)} |", "|---|" + "---|" * len(formats)]
    for family in sys.argv[1:] or list(TWINS):
        reasons: dict[str, int] = {}
        lines = []
        with tempfile.TemporaryDirectory() as work:
            folder = write_twin(family, Path(work) / "base")
            for method in METHODS:
                cells = []
                for name, done in cases(folder, family, method, formats):
                    cells.append(_cell(done, reasons))
                    sys.stderr.write(f"{family} {method} {name}: {cells[-1]}\n")
                lines.append(f"| {method} | {' | '.join(cells)} |")
                notes = [f"[{number}] {reason}" for reason, number in reasons.items()]
                _put(family, "\n".join(["", *head, *lines, "", "\n\n".join(notes)]))


def _put(family: str, text: str) -> None:
    """Replace one family's section of the page."""
    old = PAGE.read_text(encoding="utf-8").split("\n## ") if PAGE.is_file() else []
    sections = {section.split("\n", 1)[0]: section.split("\n", 1)[1].rstrip("\n") for section in old[1:]}
    sections[family] = text.rstrip("\n")
    ordered = [f"## {name}\n{sections[name]}" for name in TWINS if name in sections]
    PAGE.write_text("\n\n".join([HEAD.rstrip("\n"), *ordered]) + "\n", encoding="utf-8")


def _cell(done: Exported | str, reasons: dict[str, int]) -> str:
    if isinstance(done, str):
        return f"refused [{reasons.setdefault(done, len(reasons) + 1)}]"
    figure = f"{max(check.outputs_relative for check in done.verification):.0e}"
    if done.lost:
        figure = f"{done.lost:.0%} of the change lost"
    marks = [f" [{reasons.setdefault(note, len(reasons) + 1)}]" for note in done.notes if not done.lost]
    return figure + "".join(marks)


if __name__ == "__main__":
    main()
