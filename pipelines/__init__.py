"""Data pipelines: they execute commands on images and hand both on as a batch."""
