"""Models of transformers that look at pictures, whatever they say: where they come from, how they are loaded.

Weights are safetensors only, and code that comes with a model is never run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils.tqdm import enable_progress_bars
from torch import Tensor

from data_tools.errors import UNSAFE, DataToolsError, UsageError, counted, shown
from data_tools.hub import only_fetched

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
UNREADABLE = (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError)
"""What transformers raises for files that are missing, damaged or of something else."""


@dataclass(frozen=True)
class Source:
    """Where everything of one model comes from."""

    place: str
    """A local folder or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None: main."""

    def load(self, kind: Any, **more: Any) -> Any:
        """`kind.from_pretrained`, without any code of the model's own."""
        return kind.from_pretrained(
            self.place, revision=self.revision or "main", trust_remote_code=False,
            local_files_only=only_fetched(self.place), **more,
        )  # fmt: skip

    def model(self, kind: Any, device: torch.device) -> Any:
        """The model, whole, on the device and ready to be asked.

        Raises:
            UsageError: the files lack weights.
            DataToolsError: there are pickled weights only, exit code 8.
        """
        self.refuse_pickles()
        # keep: the library's bars for loading would tear ours apart; those for downloads stay.
        transformers.utils.logging.disable_progress_bar()
        enable_progress_bars()
        # keep: bf16 has the range of fp32, so no model overflows; on CPUs it is slower than fp32.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, facts = self.load(kind, use_safetensors=True, dtype=dtype, output_loading_info=True)
        gaps = sorted(set(facts["missing_keys"]) & {name for name, _ in model.named_parameters()})
        if gaps:
            raise UsageError(
                f"{shown(self.place)} lacks {counted(len(gaps), 'weight')} of a {type(model).__name__}, such as "
                f"{gaps[0]}; they would be random, and so would its answers. Take a conversion for transformers itself "
                "(one that needs no code of its own), made for this task."
            )
        return model.to(device).eval().requires_grad_(False)

    def refuse_pickles(self) -> None:
        """Stop at a folder without safetensors.

        Raises:
            DataToolsError: exit code 8.
        """
        folder = Path(self.place)
        if folder.is_dir() and not any(folder.glob("*.safetensors")):
            pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
            if pickles:
                raise DataToolsError(
                    f"{shown(self.place)} holds its weights as {', '.join(pickles)} only. Such a file is a pickle, "
                    "which can run any code when it is opened: take the model's safetensors, or another revision.",
                    exit_code=UNSAFE,
                )


def reason_of(error: BaseException) -> str:
    """The first line of what an exception says, or its name."""
    return shown(next(iter(str(error).strip().splitlines()), "") or type(error).__name__)


def choose_device(wanted: str | None) -> torch.device:
    """The device asked for; else this process's GPU, else the CPU.

    Raises:
        UsageError: it is not there.
    """
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if wanted is None:
        wanted = f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device {wanted} cannot be used here ({reason_of(error)}); leave it out, or give cpu."
        ) from error
    return device


def moved(inputs: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Inputs on the model's device, floats in its number format."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def weights_digest(model: Any) -> str:
    """Digest of all weights, by which answers of other weights are told apart."""
    digest = hashlib.sha256(str(model.config.to_dict()).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
