"""Several processes that work together: what they exchange, and what happens when one of them fails."""
