"""Stable Diffusion 1.5, textual inversion: one new word for a subject, in a file of a few kilobytes.

For a 6 GB card. Nothing but the vectors of the word is trained, so the base cannot forget anything; likeness is weaker
than a LoRA's. `tokens.words` names the word and what it starts from; beside an adapter it is pivotal tuning.
"""

from finetune import make_run
from finetune.cli import run_recipe

RUN = make_run(
    {
        "model": {"base": "stable-diffusion-v1-5/stable-diffusion-v1-5", "variant": "fp16"},
        "data": {"folder": "photos", "caption_template": "a photo of <my-dog>", "trigger": "<my-dog>"},
        "adapter": None,
        # several vectors hold more of a subject than one: Gal et al. 2022, arXiv:2208.01618, section 5
        "tokens": {"words": {"<my-dog>": "dog"}, "vectors": 4, "learning_rate": 5e-3},
        "optimizer": {"name": "adamw", "schedule": "constant", "weight_decay": 0.0},
        "train": {"steps": 2000, "batch_size": 4},
        "validation": {"every": 250, "holdout": 2},
        "samples": {"prompts": ["a photo of <my-dog> in the snow", "a painting of <my-dog>"], "every": 500},
        "checkpoint": {"every": 250},
        "output_dir": "runs/sd15-textual-inversion",
    }
)

if __name__ == "__main__":
    run_recipe(RUN)
