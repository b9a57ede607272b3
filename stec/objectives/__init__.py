"""The losses and their sum."""
