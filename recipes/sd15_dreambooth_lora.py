"""Stable Diffusion 1.5, DreamBooth LoRA: one subject under a new word, its class kept by prior preservation.

For 5 to 20 pictures of one subject and an 8 GB card or a Colab T4. Trains UNet and text encoder. Say what it is:
`finetune train recipes/sd15_dreambooth_lora.py --set data.folder=photos
--set "data.caption_template=a photo of sks dog" --set 'data.prior.prompts=["a photo of a dog"]'`.
"""

from finetune import make_run
from finetune.cli import run_recipe

RUN = make_run(
    {
        "model": {"base": "stable-diffusion-v1-5/stable-diffusion-v1-5", "variant": "fp16"},
        "data": {
            "folder": "photos",
            "captions": "template",
            "caption_template": "a photo of sks dog",
            "trigger": "sks",
            "prior": {"prompts": ["a photo of a dog"], "images": 100},  # 100 to 200: the DreamBooth paper's range
        },
        "adapter": {"rank": 16},
        "text_encoder_adapter": {"rank": 8, "learning_rate": 5e-5},  # half the UNet's rate: text encoders overfit first
        "optimizer": {"learning_rate": 1e-4, "schedule": "constant"},
        "train": {"steps": 800, "batch_size": 2},  # a subject and a class picture each where they share a size
        "validation": {"every": 200, "holdout": 2},
        "samples": {"prompts": ["a photo of sks dog on a beach", "a photo of a dog on a beach"]},
        "checkpoint": {"every": 200},
        "output_dir": "runs/sd15-dreambooth",
    }
)

if __name__ == "__main__":
    run_recipe(RUN)
