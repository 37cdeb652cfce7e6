"""Tokenizers, all of them tiktoken encodings, and the training of one."""
