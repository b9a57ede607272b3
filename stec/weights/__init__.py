"""Trained weights: reading, writing, and the formats of other libraries."""
