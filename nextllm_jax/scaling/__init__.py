"""Predicts a large run from a ladder of small ones: a family of configs, their runs, a fit, and a plan."""
