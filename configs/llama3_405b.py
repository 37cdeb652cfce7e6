"""The published shape of Llama 3.1 405B; what it does not name is as in llama3_8b.py.

python train.py --config configs/llama3_405b.py
"""

import dataclasses
from pathlib import Path

from nextllm_jax.config import Config, MeshConfig, OptimizerConfig
from nextllm_jax.config.files import load_config_file


def get_config() -> Config:
    """405,853,388,800 parameters, fully sharded over the pod, tensor parallel over 8 chips."""
    base = load_config_file(str(Path(__file__).with_name("llama3_8b.py")))
    model = dataclasses.replace(
        base.model,
        num_layers=126,
        embed_dim=16_384,
        mlp_dim=53_248,
        num_heads=128,
        context_length=131_072,
        rope_scaling="llama3",
        rope_scaling_factor=8.0,
    )
    return dataclasses.replace(
        base,
        workdir=None,
        model=model,
        optimizer=OptimizerConfig(learning_rate=8e-5, warmup_steps=8000),
        training=dataclasses.replace(base.training, global_batch_size=2048),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=8),
    )
