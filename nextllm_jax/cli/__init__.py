"""The `nextllm` command and its subcommands, one module for each family."""
