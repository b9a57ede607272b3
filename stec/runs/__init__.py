"""A run on disk: its folder, its checkpoints, and what can be read of it."""
