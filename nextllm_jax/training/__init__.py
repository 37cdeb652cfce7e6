"""Training: the train step, the optimizer, and the training loop."""
