"""Evaluation of a model on texts, on prepared data and with lm-evaluation-harness."""
