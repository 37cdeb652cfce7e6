"""Train a model: `python train.py --config configs/small.py`; `--help` lists every setting."""

from nextllm_jax.cli.main import run_main, train_command

if __name__ == "__main__":
    run_main(train_command)
