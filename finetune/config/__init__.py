"""Run and its sections: every knob of a training run, its unit, its default and its check live here and nowhere else.

A `Run` comes from a recipe (a Python file with a `RUN`), from YAML or JSON, or from the `run.json` of an earlier run.
`finetune show` prints it with the meaning of each field. Reading and overriding is in `finetune.run_files`.
"""

from finetune.config.adapter import (
    AdapterConfig,
    BlockConfig,
    EncoderConfig,
    NetworkAdapterConfig,
    TextAdapterConfig,
)
from finetune.config.contradictions import contradictions, has_word
from finetune.config.data import DataConfig, PriorConfig
from finetune.config.export import ExportConfig
from finetune.config.model import ModelConfig
from finetune.config.objective import ObjectiveConfig, TeacherConfig
from finetune.config.optimizer import OptimizerConfig
from finetune.config.run import FREE_TO_CHANGE, Run, differences, flatten, is_free
from finetune.config.section import Section
from finetune.config.tokens import TokensConfig
from finetune.config.train import CheckpointConfig, SamplesConfig, TrainConfig, ValidationConfig

__all__ = [
    "FREE_TO_CHANGE",
    "AdapterConfig",
    "BlockConfig",
    "CheckpointConfig",
    "DataConfig",
    "EncoderConfig",
    "ExportConfig",
    "ModelConfig",
    "NetworkAdapterConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PriorConfig",
    "Run",
    "SamplesConfig",
    "Section",
    "TeacherConfig",
    "TextAdapterConfig",
    "TokensConfig",
    "TrainConfig",
    "ValidationConfig",
    "contradictions",
    "differences",
    "flatten",
    "has_word",
    "is_free",
]
