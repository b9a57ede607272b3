"""The losses and their sum, and the targets of the inverse model."""
