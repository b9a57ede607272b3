"""Several processes that work together: collectives, and the report of a process that failed."""
