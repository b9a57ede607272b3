"""A training run: the loop, its step, optimizers, signals, and the processes that train together."""
