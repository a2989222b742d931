"""SDXL, LoRA on the UNet: a subject or a style from 10 to 50 captioned pictures at 1024 pixels.

For a 12 GB card; with `--set model.storage=int8` the frozen UNet takes one byte per weight in place of two, for 8 GB.
Captions are encoded once, then text encoders and autoencoder leave the card. A single file is a base as well:
`--set model.base=sd_xl_base_1.0.safetensors --set model.variant=null`.
"""

from finetune import make_run
from finetune.cli import run_recipe

RUN = make_run(
    {
        "model": {"base": "stabilityai/stable-diffusion-xl-base-1.0", "variant": "fp16"},
        "data": {"folder": "photos"},
        "adapter": {"rank": 16},
        "objective": {"weighting": "min_snr"},  # gamma 5: Hang et al. 2023
        "optimizer": {"learning_rate": 1e-4, "schedule": "cosine", "warmup_steps": 50},
        "train": {"steps": 1500, "batch_size": 1, "gradient_accumulation_steps": 2},
        "validation": {"every": 250, "holdout": 2},
        "checkpoint": {"every": 250},
        "output_dir": "runs/sdxl-lora",
    }
)

if __name__ == "__main__":
    run_recipe(RUN)
