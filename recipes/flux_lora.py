"""Flux.1 dev, LoRA on the transformer: a subject or a style from 10 to 50 captioned pictures.

For a 16 GB card: the frozen transformer is held in nf4 (QLoRA); with 24 GB set model.storage=int8, with 48 GB full. T5
and CLIP encode the captions once and leave the card. Loading needs main memory for 34 GB of weights. The base is gated:
accept its licence on the hub, then `hf auth login`.
"""

from finetune import make_run
from finetune.cli import run_recipe

RUN = make_run(
    {
        "model": {"base": "black-forest-labs/FLUX.1-dev", "storage": "nf4"},
        "data": {"folder": "photos", "resolution": 768},
        "adapter": {"rank": 16},
        # SD3's paper, arXiv:2403.03206, section 3.1: middle noise levels teach a flow model most
        "objective": {"density": "logit_normal"},
        "optimizer": {"learning_rate": 1e-4, "schedule": "cosine", "warmup_steps": 50},
        "train": {"steps": 1500, "batch_size": 1, "gradient_accumulation_steps": 2},
        "validation": {"every": 250, "holdout": 2},
        "checkpoint": {"every": 250},
        "export": {"formats": ["diffusers"]},
        "output_dir": "runs/flux-lora",
    }
)

if __name__ == "__main__":
    run_recipe(RUN)
