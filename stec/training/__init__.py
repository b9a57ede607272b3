"""A training run: the loop, its step, optimizers, logs, checkpoints and signals."""
