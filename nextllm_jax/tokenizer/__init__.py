"""Tokenizers (trained here, OpenAI's, Hugging Face's and those in GGUF files) and chat templates."""
