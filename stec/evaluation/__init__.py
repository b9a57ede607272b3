"""Measures of a trained encoder, its features on disk, pictures, and the report of runs."""
