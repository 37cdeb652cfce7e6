"""The published shape of Llama 3 70B; what it does not name is as in llama3_8b.py.

python train.py --config configs/llama3_70b.py
"""

import dataclasses
from pathlib import Path

from nextllm_jax.config import Config, MeshConfig, OptimizerConfig
from nextllm_jax.config.files import load_config_file


def get_config() -> Config:
    """70,553,706,496 parameters, fully sharded over the pod, tensor parallel over 4 chips."""
    base = load_config_file(str(Path(__file__).with_name("llama3_8b.py")))
    return dataclasses.replace(
        base,
        workdir=None,
        model=dataclasses.replace(base.model, num_layers=80, embed_dim=8_192, mlp_dim=28_672, num_heads=64),
        optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=2000),
        training=dataclasses.replace(base.training, global_batch_size=1024),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=4),
    )
