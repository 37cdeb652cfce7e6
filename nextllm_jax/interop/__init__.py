"""Weights from and for other programs: Hugging Face directories and GGUF files."""
