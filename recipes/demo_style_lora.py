"""The embedded base model, a style from ten pictures: neon lines under the words zwx style. No GPU, no download.

For whom: those who want to see what a style LoRA takes and what it costs the rest, in under two minutes of two CPU
cores and less than 1 GB of memory. Draw its pictures first:
`python -m finetune.demo.pictures_folder runs/demo-style/pictures neon`.
"""

from finetune import make_run
from finetune.cli import run_recipe
from finetune.demo.prompts import class_prompts, short_prompts

RUN = make_run(
    {
        "model": {"base": "demo"},
        "data": {
            "folder": "runs/demo-style/pictures",
            "trigger": "zwx",
            "prior": {
                # What the base draws without the word, so that the style stays where it is asked for.
                "prompts": [*short_prompts(48), *class_prompts("robot", own=4, others=44)],
                "images": 96,
                "inference_steps": 20,
                "guidance_scale": 3.0,
                "batch_size": 24,
            },
        },
        "adapter": {"rank": 16, "targets": "all"},
        "text_encoder_adapter": {"rank": 8, "learning_rate": 5e-4},
        "optimizer": {"name": "adamw", "learning_rate": 2e-3, "warmup_steps": 10},
        "train": {"steps": 200, "batch_size": 8, "gradient_checkpointing": False},
        "validation": {"every": 50, "holdout": 0},
        "checkpoint": {"every": 50},
        "export": {"formats": ["diffusers", "kohya"], "dtype": "fp32", "name": "zwx-style"},
        "output_dir": "runs/demo-style/run",
    }
)

if __name__ == "__main__":
    run_recipe(RUN)
