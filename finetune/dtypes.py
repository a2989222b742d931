"""Number formats of weights: their names in recipes and options, and how far rounding to each may go."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Name in recipes and options -> number format."""
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Name in a safetensors header -> number format, of weights."""
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Number format -> largest relative difference of a layer's change (Frobenius norms) that rounding explains.

Two factors rounded to nearest lose at most about 2**-11 each in fp16 and 2**-8 each in bf16; the limits are twice that.
"""
