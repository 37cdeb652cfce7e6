"""About 125M parameters with the GPT-2 tokenizer, for one host with an accelerator.

nextllm prepare --config configs/medium.py --corpus hf:HuggingFaceFW/fineweb-edu --hf-config sample-10BT
python train.py --config configs/medium.py
"""

from nextllm_jax.config import CheckpointConfig, Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig


def get_config() -> Config:
    """12 layers, 768 wide, half a million tokens a step."""
    return Config(
        model=ModelConfig(
            num_layers=12,
            embed_dim=768,
            mlp_dim=2048,
            num_heads=12,
            num_kv_heads=12,
            head_dim=64,
            context_length=1024,
            remat="dots",
            qk_norm=True,
            zero_init_outputs=True,
        ),
        data=DataConfig(
            corpus="hf:HuggingFaceFW/fineweb-edu",
            hf_config="sample-10BT",
            tokenizer="gpt2",
            sequence_length=1024,
            validation_fraction=0.0005,
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=6e-4,
            warmup_steps=700,
            schedule="linear",
            final_learning_rate_fraction=0.0,
        ),
        training=TrainingConfig(
            steps=20_000,
            global_batch_size=512,
            accumulation_steps=8,
            evaluate_every_steps=1000,
        ),
        checkpoint=CheckpointConfig(every_steps=1000),
    )
