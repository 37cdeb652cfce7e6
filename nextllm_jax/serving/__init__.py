"""`nextllm serve`: models behind an HTTP API that OpenAI's clients understand."""
