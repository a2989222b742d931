"""The embedded base model: where it lies. Cheap to import (no torch)."""

from pathlib import Path

BASE_DIR = Path(__file__).parent / "base"
"""A complete Stable Diffusion pipeline folder, for `StableDiffusionPipeline.from_pretrained`."""
CHECKER_FILE = Path(__file__).parent / "checker.safetensors"
"""Weights of the picture checker (`finetune.demo.checker`)."""
