"""Diagnostics for training: checks before it starts, replay of a bad step, and a proof that resuming is exact."""
