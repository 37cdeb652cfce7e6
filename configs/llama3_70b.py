"""The published shape of Llama 3 70B.

python train.py --config configs/llama3_70b.py
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
    """70,553,706,496 parameters, fully sharded over the pod, tensor parallel over 4 chips."""
    return Config(
        model=ModelConfig(
            vocab_size=128_256,
            num_layers=80,
            embed_dim=8_192,
            mlp_dim=28_672,
            num_heads=64,
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
        optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=2000),
        training=TrainingConfig(
            steps=100_000,
            global_batch_size=1024,
            accumulation_steps=1,
            evaluate_every_steps=2000,
            sample_prompts=("The ", "In physics, ", "Once upon a time"),
        ),
        checkpoint=CheckpointConfig(every_steps=1000),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=4),
    )
