"""Data sets by name, images in memory, in files and in tar shards, and their index."""
