"""Tiny models with random weights that estimate depth, of the real classes."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

SIDE = 28
"""What they look at, in pixels."""


def dpt() -> transformers.PreTrainedModel:
    """A vision transformer whose four layers are put together again, as Intel's MiDaS models."""
    config = transformers.DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=SIDE, patch_size=4,
        neck_hidden_sizes=[8, 8, 8, 8], backbone_out_indices=[0, 1, 2, 3], fusion_hidden_size=8,
        head_in_index=-1, reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    return transformers.DPTForDepthEstimation(config)


def depth_anything(**changes: object) -> transformers.PreTrainedModel:
    """The same over DINOv2."""
    backbone = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=SIDE, patch_size=4,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False, apply_layernorm=True,
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, patch_size=4, reassemble_hidden_size=16, neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8, head_hidden_size=8, **changes,
    )  # fmt: skip
    return transformers.DepthAnythingForDepthEstimation(config)


def write_depth_model(folder: Path, made: transformers.PreTrainedModel) -> Path:
    """Write a model with its preprocessor, as they are published."""
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.2)
            # keep: answers below zero are cut off, and random ones often are.
            parameter.add_(2.0 if name == "head.conv3.bias" else 0.0)
    made.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    transformers.DPTImageProcessorPil(size=size, keep_aspect_ratio=False).save_pretrained(folder)
    return folder
