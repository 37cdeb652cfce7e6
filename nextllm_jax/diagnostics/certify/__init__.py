"""`nextllm certify`: compares a model with other implementations, and with its own exports."""
