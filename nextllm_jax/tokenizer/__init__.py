"""Tokenizers: our own, OpenAI's, Hugging Face's and those of GGUF files; and chat templates."""
