"""The embedded base model, DreamBooth LoRA: what `finetune demo` runs. No GPU, no download, two minutes of training.

For whom: everybody who wants to see the whole job before trusting it with pictures of their own. A tiny Stable
Diffusion that ships with the toolkit learns a robot it has never seen under the word sks, while ordinary robots stay
what they are. Two CPU cores, under 1 GB of memory. Draw its pictures first:
`python -m finetune.demo.pictures_folder runs/demo/pictures`. What comes out without class pictures, or without training
the text encoder: `python -m finetune.demo.compare dreambooth dreambooth-without-prior text-encoder-off`.
"""

from finetune import make_run
from finetune.cli import run_recipe
from finetune.demo.prompts import class_prompts

RUN = make_run(
    {
        "model": {"base": "demo"},
        "data": {
            "folder": "runs/demo/pictures",
            "trigger": "sks",
            "prior": {
                # Worded like the subject's captions, so that only the trigger tells them apart; the others keep the
                # rest of the base's world as it is.
                "prompts": class_prompts("robot", own=48, others=48),
                "images": 96,  # one of each
                "prior_loss_weight": 1.5,
                "inference_steps": 20,
                "guidance_scale": 3.0,
                "batch_size": 24,
            },
        },
        # A tiny UNet has attention in its lower levels only; what a subject looks like needs its convolutions as well.
        "adapter": {"rank": 16, "targets": "all"},
        "text_encoder_adapter": {"rank": 8, "learning_rate": 1e-3},
        # Tiny models take large steps; 8-bit states save memory on large ones only, and on a CPU they cost time.
        "optimizer": {"name": "adamw", "learning_rate": 2e-3, "warmup_steps": 10},
        "train": {"steps": 360, "batch_size": 8, "gradient_checkpointing": False},
        "validation": {"every": 90, "holdout": 2},
        "checkpoint": {"every": 90},
        "export": {"formats": ["diffusers", "kohya", "merged"], "dtype": "fp32", "name": "sks-robot"},
        "output_dir": "runs/demo/run",
    }
)

if __name__ == "__main__":
    run_recipe(RUN)
