"""The published shape of Qwen3 30B-A3B; what it does not name is as in llama3_8b.py.

python train.py --config configs/qwen3_30b_a3b.py
"""

import dataclasses
from pathlib import Path

from nextllm_jax.config import Config, MeshConfig
from nextllm_jax.config.files import load_config_file


def get_config() -> Config:
    """30,532,122,624 parameters; a token uses 3,353,032,704 of them. The tokenizer is trained on the corpus."""
    base = load_config_file(str(Path(__file__).with_name("llama3_8b.py")))
    model = dataclasses.replace(
        base.model,
        vocab_size=151_936,
        num_layers=48,
        embed_dim=2048,
        mlp_dim=6144,
        num_heads=32,
        num_kv_heads=4,
        context_length=40_960,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        qk_norm=True,
        num_experts=128,
        experts_per_token=8,
        expert_mlp_dim=768,
        load_balance_weight=0.001,
        router_z_weight=0.0,
    )
    return dataclasses.replace(
        base,
        workdir=None,
        model=model,
        data=dataclasses.replace(base.data, tokenizer="train", vocab_size=151_936, sequence_length=4096),
        training=dataclasses.replace(base.training, global_batch_size=1024),
        mesh=MeshConfig(data=1, fsdp=-1, expert=4),
    )
