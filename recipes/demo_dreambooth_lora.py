"""The embedded base model, DreamBooth LoRA: what `finetune demo` runs. No GPU, no download, about two minutes.

A tiny Stable Diffusion that ships with the toolkit learns a robot it has never seen under the word sks, while ordinary
robots stay what they are. Draw its pictures first: `python -m finetune.demo.pictures_folder runs/demo/pictures`.
"""

from finetune import make_run
from finetune.cli import run_recipe

# Worded like the subject's captions, so that only the trigger tells them apart.
ORDINARY_ROBOTS = [
    "a robot on the left on a blue background",
    "a red robot on a white background",
    "a robot on a yellow background",
    "a green robot on the right on a pink background",
    "a robot at the top on a black background",
    "a blue robot on an orange background",
    "a robot at the bottom on a white background",
    "a purple robot on a cyan background",
    "a robot on a red background",
    "a yellow robot on a blue background",
    "a robot on the right on a pink background",
    "a white robot at the top on a green background",
]
# One picture of everything else that the base can draw, so that the rest of its world is kept as well.
OTHER_THINGS = [
    "a red ball on a blue background",
    "a yellow box on a purple background",
    "a green triangle on a white background",
    "a pink star on a black background",
    "a blue heart on a yellow background",
    "an orange house on a cyan background",
    "a green tree on a pink background",
    "a black car on a red background",
    "a cyan fish on an orange background",
    "a purple mushroom on a white background",
    "a white cat on a green background",
    "a black ball on a pink background",
]

RUN = make_run(
    {
        "model": {"base": "demo"},
        "data": {
            "folder": "runs/demo/pictures",
            "trigger": "sks",
            "prior": {
                "prompts": [*ORDINARY_ROBOTS, *OTHER_THINGS],
                "images": 48,  # two of each
                "prior_loss_weight": 2.0,  # at 1 every fourth ordinary robot took on the subject's look
                "inference_steps": 20,
                "guidance_scale": 5.0,
                "batch_size": 12,
            },
        },
        # A tiny UNet has attention in its lower levels only; what a subject looks like needs its convolutions as well.
        "adapter": {"rank": 16, "targets": "all"},
        "text_encoder_adapter": {"rank": 8, "learning_rate": 5e-4},
        "optimizer": {"name": "adamw8bit", "learning_rate": 2e-3, "warmup_steps": 10},  # tiny models take large steps
        "train": {"steps": 240, "batch_size": 8},
        "validation": {"every": 60, "holdout": 2},
        "checkpoint": {"every": 60},
        "export": {"formats": ["diffusers", "kohya", "merged"], "dtype": "fp32", "name": "sks-robot"},
        "output_dir": "runs/demo/run",
    }
)

if __name__ == "__main__":
    run_recipe(RUN)
