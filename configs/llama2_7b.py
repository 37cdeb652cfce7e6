"""The published shape of Llama 2 7B; what it does not name is as in llama3_8b.py.

python train.py --config configs/llama2_7b.py
"""

import dataclasses
from pathlib import Path

from nextllm_jax.config import Config
from nextllm_jax.config.files import load_config_file


def get_config() -> Config:
    """6,738,415,616 parameters, fully sharded over one slice, with a tokenizer trained on the corpus."""
    base = load_config_file(str(Path(__file__).with_name("llama3_8b.py")))
    model = dataclasses.replace(
        base.model,
        vocab_size=32_000,
        mlp_dim=11_008,
        num_kv_heads=32,
        context_length=4096,
        rope_theta=10_000.0,
    )
    return dataclasses.replace(
        base,
        workdir=None,
        model=model,
        data=dataclasses.replace(base.data, tokenizer="train", vocab_size=32_000, sequence_length=4096),
        training=dataclasses.replace(base.training, global_batch_size=1024),
    )
