"""Imports and exports models of other programs: Hugging Face directories and GGUF files."""
