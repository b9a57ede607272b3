"""Networks: the encoder, the heads, and batch norm over all processes."""
