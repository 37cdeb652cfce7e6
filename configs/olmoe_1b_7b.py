"""The published shape of OLMoE 1B-7B; what it does not name is as in llama3_8b.py.

python train.py --config configs/olmoe_1b_7b.py
"""

import dataclasses
from pathlib import Path

from nextllm_jax.config import Config
from nextllm_jax.config.files import load_config_file


def get_config() -> Config:
    """6,919,161,856 parameters; a token uses 1,282,017,280 of them. The tokenizer is trained on the corpus."""
    base = load_config_file(str(Path(__file__).with_name("llama3_8b.py")))
    model = dataclasses.replace(
        base.model,
        vocab_size=50_304,
        num_layers=16,
        embed_dim=2048,
        mlp_dim=1024,
        num_heads=16,
        num_kv_heads=16,
        context_length=4096,
        rope_theta=10_000.0,
        qk_norm=True,
        qk_norm_over="projection",
        num_experts=64,
        experts_per_token=8,
        normalize_expert_weights=False,
        load_balance_weight=0.01,
        router_z_weight=0.001,
    )
    return dataclasses.replace(
        base,
        workdir=None,
        model=model,
        data=dataclasses.replace(base.data, tokenizer="train", vocab_size=50_304, sequence_length=4096),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=4e-4, warmup_steps=2500),
        training=dataclasses.replace(base.training, global_batch_size=1024),
    )
