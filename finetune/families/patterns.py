"""Names of layers, as regular expressions: what the presets of several families share."""

from __future__ import annotations

UNET_ATTENTION = r"attn[12]\.(to_q|to_k|to_v|to_out\.0)"
UNET_MLP = r"ff\.net\.(0\.proj|2)|proj_in|proj_out"
UNET_CONV = r"conv1|conv2|conv_shortcut|time_emb_proj|(down|up)samplers\.0\.conv"

CLIP_ATTENTION = r".*\.self_attn\.(q|k|v|out)_proj"
CLIP_MLP = r".*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"

T5_ATTENTION = r".*\.SelfAttention\.(q|k|v|o)"
T5_MLP = r".*\.(SelfAttention\.(q|k|v|o)|DenseReluDense\.(wi|wi_0|wi_1|wo))"

JOINT_ATTENTION = r"attn2?\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out)"
JOINT_MLP = r"ff(_context)?\.net\.(0\.proj|2)"


def presets(denoiser: tuple[str, str, str], **encoders: tuple[str, str]) -> dict[str, dict[str, str]]:
    """The three presets of a family.

    Args:
        denoiser: expressions for attention, attention+mlp and all.
        encoders: text encoder -> expressions for attention and for the other two.
    """
    attention, mlp, everything = denoiser
    return {
        "attention": {"denoiser": attention, **{name: pair[0] for name, pair in encoders.items()}},
        "attention+mlp": {"denoiser": mlp, **{name: pair[1] for name, pair in encoders.items()}},
        "all": {"denoiser": everything, **{name: pair[1] for name, pair in encoders.items()}},
    }


CLIP = (CLIP_ATTENTION, CLIP_MLP)
T5 = (T5_ATTENTION, T5_MLP)
UNET = (
    rf".*\.({UNET_ATTENTION})",
    rf".*\.({UNET_ATTENTION}|{UNET_MLP})",
    rf".*\.({UNET_ATTENTION}|{UNET_MLP}|{UNET_CONV})",
)
"""Expressions for the UNet of SD1, SD2, SDXL and the refiner."""
