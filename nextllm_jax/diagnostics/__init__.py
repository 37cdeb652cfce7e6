"""What is wrong, or would go wrong, with a training: before it starts, at a bad step, and in resuming."""
