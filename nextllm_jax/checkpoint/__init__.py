"""Checkpoints: atomic saves, verification and restoring."""
