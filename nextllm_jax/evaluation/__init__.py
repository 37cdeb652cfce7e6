"""Scores of a model on texts and on prepared data."""
