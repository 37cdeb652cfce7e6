"""The published shape of Mixtral 8x7B; what it does not name is as in llama3_8b.py.

python train.py --config configs/mixtral_8x7b.py
"""

import dataclasses
from pathlib import Path

from nextllm_jax.config import Config, MeshConfig
from nextllm_jax.config.files import load_config_file


def get_config() -> Config:
    """46,702,792,704 parameters; a token uses 12,879,925,248 of them. The tokenizer is trained on the corpus."""
    base = load_config_file(str(Path(__file__).with_name("llama3_8b.py")))
    model = dataclasses.replace(
        base.model,
        vocab_size=32_000,
        context_length=32_768,
        rope_theta=1_000_000.0,
        num_experts=8,
        experts_per_token=2,
        load_balance_weight=0.02,
        router_z_weight=0.0,
    )
    return dataclasses.replace(
        base,
        workdir=None,
        model=model,
        data=dataclasses.replace(base.data, tokenizer="train", vocab_size=32_000, sequence_length=4096),
        training=dataclasses.replace(base.training, global_batch_size=1024),
        mesh=MeshConfig(data=1, fsdp=-1, expert=4),
    )
