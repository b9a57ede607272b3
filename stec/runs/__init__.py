"""A run on disk: its folder and its checkpoints, written and read."""
