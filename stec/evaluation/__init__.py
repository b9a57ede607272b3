"""Measures of a trained encoder, its features on disk, previews, and the report of runs."""
