"""Generates text: loading a model, the decode loop, sampling, streaming and chat."""
