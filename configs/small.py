"""The first real run: 8 layers, 256 wide, on the standard library's source.

python train.py --config configs/small.py
"""

from nextllm_jax.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    """7.9M parameters, 2,500 steps of 4,096 tokens: an hour on two CPU cores, minutes on an accelerator."""
    return Config(
        model=ModelConfig(
            num_layers=8,
            embed_dim=256,
            mlp_dim=688,
            num_heads=8,
            num_kv_heads=4,
            head_dim=32,
            context_length=1024,
            qk_norm=True,
            zero_init_outputs=True,
        ),
        data=DataConfig(vocab_size=8192, sequence_length=256),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.003,
            adamw_learning_rate=0.006,
            weight_decay=0.2,
            warmup_steps=200,
            schedule="linear",
            final_learning_rate_fraction=0.0,
        ),
        training=TrainingConfig(steps=2500, global_batch_size=16, evaluate_every_steps=250),
        checkpoint=CheckpointConfig(every_steps=250),
    )
