"""The published shape of Llama 3.2 1B.

python train.py --config configs/llama3_1b.py
"""

from nextllm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)


def get_config() -> Config:
    """1,235,814,400 parameters, tied embeddings, fully sharded over one slice."""
    return Config(
        model=ModelConfig(
            vocab_size=128_256,
            num_layers=16,
            embed_dim=2_048,
            mlp_dim=8_192,
            num_heads=32,
            num_kv_heads=8,
            head_dim=64,
            context_length=131_072,
            rope_theta=500_000.0,
            rope_scaling="llama3",
            rope_scaling_factor=32.0,
            tie_embeddings=True,
            remat="full",
        ),
        data=DataConfig(
            corpus="hf:HuggingFaceFW/fineweb-edu",
            tokenizer="cl100k_base",
            sequence_length=8192,
            validation_fraction=0.00001,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
        training=TrainingConfig(
            steps=100_000,
            global_batch_size=256,
            accumulation_steps=1,
            evaluate_every_steps=2000,
        ),
        checkpoint=CheckpointConfig(every_steps=1000),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
