"""Checkpoints: written whole, verified, restored."""
