"""Every setting of a run. Nothing here imports jax."""

from nextllm_jax.config.model import ModelConfig
from nextllm_jax.config.optimizer import OptimizerConfig
from nextllm_jax.config.reporting import EvaluationConfig, LoggingConfig
from nextllm_jax.config.run import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    TrainingConfig,
)
from nextllm_jax.config.sampling import SamplingConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SamplingConfig",
    "TrainingConfig",
]
