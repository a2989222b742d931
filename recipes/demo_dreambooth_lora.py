"""The embedded base model, DreamBooth LoRA: what `finetune demo` runs. No GPU, no download, about two minutes.

A tiny Stable Diffusion that ships with the toolkit learns a robot it has never seen under the word sks, while ordinary
robots stay what they are. Draw its pictures first: `python -m finetune.demo.pictures_folder runs/demo/pictures`.
"""

from finetune import make_run
from finetune.cli import run_recipe

RUN = make_run(
    {
        "model": {"base": "demo"},
        "data": {
            "folder": "runs/demo/pictures",
            "trigger": "sks",
            "prior": {
                "prompts": [  # worded like the subject's captions, so that only the trigger tells them apart
                    f"a {colour}robot on a {background} background"
                    for colour, background in [
                        ("", "blue"), ("red ", "white"), ("", "yellow"), ("green ", "pink"), ("", "black"),
                        ("blue ", "orange"), ("", "white"), ("purple ", "cyan"), ("", "red"), ("yellow ", "blue"),
                        ("", "pink"), ("white ", "green"),
                    ]
                ],
                "images": 48,
                "inference_steps": 20,
                "guidance_scale": 5.0,
                "batch_size": 12,
            },
        },
        "adapter": {"rank": 16},
        "text_encoder_adapter": {"rank": 8},
        "optimizer": {"name": "adamw8bit", "learning_rate": 2e-3, "warmup_steps": 10},  # tiny models take large steps
        "train": {"steps": 240, "batch_size": 8},
        "validation": {"every": 60, "holdout": 2},
        "checkpoint": {"every": 60},
        "export": {"formats": ["diffusers", "kohya", "merged"], "dtype": "fp32", "name": "sks-robot"},
        "output_dir": "runs/demo/run",
    }
)  # fmt: skip

if __name__ == "__main__":
    run_recipe(RUN)
