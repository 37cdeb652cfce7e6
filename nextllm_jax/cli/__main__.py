"""`python -m nextllm_jax.cli` is the `nextllm` command."""

from nextllm_jax.cli.main import main

main()
