"""Pure array functions: no Flax, no config."""
