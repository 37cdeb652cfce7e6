"""Sample from a trained model: `python sample.py --checkpoint runs/tiny --prompt "def "`; `--help` lists options."""

from nextllm_jax.cli.main import run_main
from nextllm_jax.cli.sample import sample_command

if __name__ == "__main__":
    run_main(sample_command)
