"""configs/tiny.py with experts: the same active parameters per token, and 2.7 times as many in total.

python train.py --config configs/tiny_moe.py
python sample.py --checkpoint runs/tiny_moe --prompt "def "
"""

import dataclasses
from pathlib import Path

from nextllm_jax.config import Config
from nextllm_jax.config.files import load_config_file


def get_config() -> Config:
    """Eight experts per layer, each half as wide as the MLP of configs/tiny.py. A token gets two of them."""
    base = load_config_file(str(Path(__file__).with_name("tiny.py")))
    model = dataclasses.replace(base.model, num_experts=8, experts_per_token=2, expert_mlp_dim=192)
    return dataclasses.replace(base, workdir=None, model=model)
