"""Stable Diffusion 1.5, LoRA on the UNet: a subject or a style from 10 to 50 captioned pictures.

For a 6 GB card or a Colab T4. Trains the attention layers; captions are encoded once and the text encoder leaves
the card. Start here: `finetune train recipes/sd15_lora.py --set data.folder=photos`.
"""

from finetune import make_run
from finetune.cli import run_recipe

RUN = make_run(
    {
        "model": {"base": "stable-diffusion-v1-5/stable-diffusion-v1-5", "variant": "fp16"},
        "data": {"folder": "photos"},
        "adapter": {"rank": 16},  # 3.2 million parameters, a 6.4 MB file in fp16
        "objective": {"weighting": "min_snr"},  # gamma 5: Hang et al. 2023, fewer steps for the same quality
        "optimizer": {"learning_rate": 1e-4, "schedule": "cosine", "warmup_steps": 50},
        "train": {"steps": 1500, "batch_size": 2},  # 100 to 200 looks at each of 15 to 30 pictures
        "validation": {"every": 250, "holdout": 2},
        "checkpoint": {"every": 250},
        "output_dir": "runs/sd15-lora",
    }
)

if __name__ == "__main__":
    run_recipe(RUN)
