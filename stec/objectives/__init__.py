"""What is minimized: NT-Xent, the inverse model's loss, and the geometry of its target."""
