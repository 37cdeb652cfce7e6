"""The published shape of Llama 3 8B.

python train.py --config configs/llama3_8b.py
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
    """8,030,261,248 parameters, fully sharded over one slice."""
    return Config(
        model=ModelConfig(
            vocab_size=128_256,
            num_layers=32,
            embed_dim=4_096,
            mlp_dim=14_336,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            context_length=8192,
            rope_theta=500_000.0,
            tie_embeddings=False,
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
            global_batch_size=512,
            accumulation_steps=1,
            evaluate_every_steps=2000,
        ),
        checkpoint=CheckpointConfig(every_steps=1000),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
