"""Families x what a user does with a base, on the tiny twins; writes docs/families.md.

    python -m tests.campaigns.families

Every cell is run for real: a stage that fails is shown with its reason, none is skipped.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from finetune.demo.subjects import write_subject_pictures
from finetune.demo.twin_job import twin_run
from finetune.errors import UserError
from finetune.export.run import export_run
from finetune.families import FAMILIES, Choices, load_family
from finetune.families.original_keys import to_original
from finetune.families.twins import write_twin
from finetune.run_files import make_run
from finetune.storage import read_safetensors, write_safetensors
from finetune.tracking import Reporter
from finetune.training.trainer import train

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "families.md"
FORMATS = ("diffusers", "kohya", "peft", "merged", "single-file")
INPAINTING = " inpainting"
"""Behind a family's name: its inpainting model."""
NAMES = [*FAMILIES, *(f"{name}{INPAINTING}" for name, family in FAMILIES.items() if family.inpainting_class)]
HEAD = """# What works with which family

Written by `python -m tests.campaigns.families` on the tiny twins (`finetune.families.twins`): the real classes at toy
size with random weights, on a CPU. "yes" means that the stage ran and was checked: a single file gives the same weights
to the bit, a resumed run the same adapter to the bit, and an exported file is read back by its readers and compared.
"""


class Subject:
    """One family's twin, plain or inpainting, and what became of it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name.removesuffix(INPAINTING)
        self.folder = folder
        write_twin(self.name, folder / "base", inpainting=name.endswith(INPAINTING))
        write_subject_pictures(folder / "pictures", 6)

    def run(self, where: str, steps: int):
        """A run of `steps` steps below `where`; the same whatever its length."""
        document = twin_run(self.name, self.folder).model_dump(mode="json")
        document["train"] |= {"steps": steps}
        document["optimizer"] |= {"schedule": "constant"}
        document["validation"] |= {"every": 2}
        document["checkpoint"] |= {"every": 2}
        document["data"]["cache_folder"] = str(self.folder / "cache")
        document["output_dir"] = str(self.folder / where)
        return make_run(document)

    def load_folder(self) -> None:
        """The diffusers folder is recognised."""
        family, _ = load_family(str(self.folder / "base"))
        assert family.name == self.name

    def load_single_file(self) -> None:
        """The same model as one file in the original layout, every weight the same."""
        family, components = load_family(str(self.folder / "base"))
        tensors = {"v_pred": torch.zeros(0)} if len(family.skeletons) == 2 and family.denoiser == "unet" else {}
        for component, layout in family.original.items():
            module = components.modules()["denoiser" if component == family.denoiser else component]
            tensors |= to_original(layout, component, module, module.state_dict())
        path = self.folder / "single.safetensors"
        write_safetensors(path, tensors, {})
        _, found = load_family(str(path), choices=Choices(skeleton=self.folder / "base"))
        for part, module in components.modules().items():
            state = found.modules()[part].state_dict()
            assert all(torch.equal(state[key], value) for key, value in module.state_dict().items()), part

    def train_both(self) -> None:
        """LoRA on the denoiser and the text encoders, with cached latents, validation and sample sheets."""
        result = train(self.run("straight", 4), Reporter())
        trained = {key.partition(".")[0] for key in result.adapter.tensors}
        assert trained == {result.family.denoiser, *result.family.usual_encoders()}, trained
        assert result.validation is not None
        assert result.validation.value != 1.0

    def cache(self) -> None:
        """Pictures were encoded once and stand on disk."""
        assert any((self.folder / "cache").rglob("*")), "no cache was written"

    def resume(self) -> None:
        """Two steps and two more give the adapter of four, to the bit."""
        train(self.run("halves", 2), Reporter())
        train(self.run("halves", 4), Reporter())
        whole, _ = read_safetensors(self.folder / "straight" / "adapter.safetensors")
        halves, _ = read_safetensors(self.folder / "halves" / "adapter.safetensors")
        assert whole.keys() == halves.keys()
        assert all(torch.equal(whole[key], halves[key]) for key in whole)

    def sample(self) -> None:
        """A sheet before and one after."""
        sheets = sorted((self.folder / "straight" / "samples").glob("*.png"))
        assert len(sheets) >= 2, f"{len(sheets)} sheets"

    def export(self, kind: str) -> None:
        """The format is written and read back by its readers."""
        run = self.run("straight", 4)
        document = run.model_dump(mode="json")
        document["export"]["formats"] = [kind]
        export_run(run.output_dir, make_run(document), self.folder / f"exports-{kind}", Reporter())


STAGES: dict[str, Callable[[Subject], None]] = {
    "load folder": Subject.load_folder,
    "load single file": Subject.load_single_file,
    "train LoRA and text encoders": Subject.train_both,
    "cache": Subject.cache,
    "resume": Subject.resume,
    "sample": Subject.sample,
    **{f"export {kind}, read back": lambda subject, kind=kind: subject.export(kind) for kind in FORMATS},
}
"""What is tried, in this order."""


def tried(subject: Subject, stage: Callable[[Subject], None]) -> str | None:
    """Why a stage failed; None when it passed."""
    try:
        stage(subject)
    except UserError as error:
        return str(error).splitlines()[0]
    except Exception as error:  # a table of failures must go on after one
        traceback.print_exc(file=sys.stderr)
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def main() -> None:
    """Try everything and write the page."""
    torch.set_num_threads(1)
    names = sys.argv[1:] or NAMES
    outcomes: dict[str, dict[str, str | None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            subject = Subject(name, Path(folder) / name.replace(" ", "-"))
            outcomes[name] = {stage: tried(subject, run) for stage, run in STAGES.items()}
            print(name, {stage: why or "yes" for stage, why in outcomes[name].items()}, flush=True)
    lines = [HEAD, f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    notes: list[str] = []
    for stage in STAGES:
        cells = []
        for name in names:
            why = outcomes[name][stage]
            if why is not None:
                notes.append(f"{len(notes) + 1}. {name}, {stage}: {why}")
            cells.append("yes" if why is None else f"no ({len(notes)})")
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    if not sys.argv[1:]:
        PAGE.write_text("\n".join([*lines, "", *notes]).rstrip() + "\n", encoding="utf-8")
    print("\n".join([*lines, "", *notes]))


if __name__ == "__main__":
    main()
