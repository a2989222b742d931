"""What is trained: layers beside frozen ones, whole weights, learned words; all under canonical names."""

from __future__ import annotations

from finetune.adapters.adapter_set import AdapterSet, attach
from finetune.adapters.files import AdapterFile, AdapterHeader
from finetune.adapters.layers import Block, LayerPlan, Wish, plan_layers
from finetune.adapters.methods import EVERYTHING, METHODS, Shape
from finetune.adapters.parts import Target
from finetune.adapters.tokens import WordTarget, add_words, count_vectors
from finetune.adapters.updates import UPDATES, merged_bias, merged_weight

__all__ = [
    "EVERYTHING",
    "METHODS",
    "UPDATES",
    "AdapterFile",
    "AdapterHeader",
    "AdapterSet",
    "Block",
    "LayerPlan",
    "Shape",
    "Target",
    "Wish",
    "WordTarget",
    "add_words",
    "attach",
    "count_vectors",
    "merged_bias",
    "merged_weight",
    "plan_layers",
]
