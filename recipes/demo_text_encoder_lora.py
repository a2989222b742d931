"""The embedded base model, DreamBooth LoRA of UNet and text encoder: what training the text encoder adds. No download.

For whom: those who wonder whether to train the text encoder too. The same odd robot as in demo-dreambooth-lora, but the
text encoder learns as well. `python -m finetune.demo.compare text-encoder-on text-encoder-off` shows both. Under two
minutes of two CPU cores, less than 1 GB of memory. Draw its pictures first:
`python -m finetune.demo.pictures_folder runs/demo-text-encoder/pictures`.
"""

from finetune import make_run
from finetune.cli import run_recipe
from finetune.demo.prompts import class_prompts

RUN = make_run(
    {
        "model": {"base": "demo"},
        "data": {
            "folder": "runs/demo-text-encoder/pictures",
            "trigger": "sks",
            "prior": {
                "prompts": class_prompts("robot", own=48, others=48),
                "images": 96,
                "prior_loss_weight": 1.5,
                "inference_steps": 20,
                "guidance_scale": 3.0,
                "batch_size": 24,
            },
        },
        "adapter": {"rank": 16, "targets": "all"},
        "text_encoder_adapter": {"rank": 8, "learning_rate": 1e-3},
        "optimizer": {"name": "adamw8bit", "learning_rate": 2e-3, "warmup_steps": 10},
        "train": {"steps": 360, "batch_size": 8},
        "validation": {"every": 90, "holdout": 2},
        "checkpoint": {"every": 90},
        "export": {"formats": ["diffusers", "kohya"], "dtype": "fp32", "name": "sks-robot"},
        "output_dir": "runs/demo-text-encoder/run",
    }
)

if __name__ == "__main__":
    run_recipe(RUN)
