"""The embedded base model, textual inversion: one new word is learned, and nothing else changes. No GPU, no download.

For whom: those who wonder what a word alone can hold. <toy> starts as a ball and comes to mean what its pictures show,
a purple mushroom; all other prompts give the very same pictures as before. A word can only ask for what the base can
draw: the robot of demo-dreambooth-lora it never finds (`python -m finetune.demo.compare textual-inversion
textual-inversion-robot` shows both). Half a minute of one CPU core, less than 1 GB of memory. Draw its pictures
first: `python -m finetune.demo.pictures_folder runs/demo-word/pictures word`.
"""

from finetune import make_run
from finetune.cli import run_recipe

RUN = make_run(
    {
        "model": {"base": "demo"},
        "data": {"folder": "runs/demo-word/pictures", "trigger": "<toy>"},
        "adapter": None,
        # One vector finds the colour only; the shape needs more places of the prompt.
        "tokens": {"words": {"<toy>": "ball"}, "vectors": 4, "learning_rate": 3e-2},
        "optimizer": {"name": "adamw", "schedule": "constant", "weight_decay": 0.0},
        "train": {"steps": 200, "batch_size": 8, "gradient_checkpointing": False},
        "validation": {"every": 50, "holdout": 2},
        "checkpoint": {"every": 50},
        "export": {"formats": ["embeddings"], "dtype": "fp32", "name": "toy"},
        "output_dir": "runs/demo-word/run",
    }
)

if __name__ == "__main__":
    run_recipe(RUN)
