"""A laptop CPU learns something visible in about 3 minutes, preparing and compiling included.

python train.py --config configs/tiny.py
python sample.py --checkpoint runs/tiny --prompt "def "
"""

from nextllm_jax.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    """About a million parameters on the standard library's source, with a tokenizer trained on it."""
    return Config(
        model=ModelConfig(
            num_layers=4,
            embed_dim=128,
            mlp_dim=384,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            context_length=512,
            qk_norm=True,
            zero_init_outputs=True,
        ),
        data=DataConfig(vocab_size=2048, sequence_length=256),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.004,
            adamw_learning_rate=0.01,
            weight_decay=0.3,
            warmup_steps=50,
            schedule="linear",
            final_learning_rate_fraction=0.0,
        ),
        training=TrainingConfig(steps=700, global_batch_size=8, log_every_steps=20, evaluate_every_steps=350),
        checkpoint=CheckpointConfig(every_steps=350),
    )
