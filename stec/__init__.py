"""S-TEC: SimCLR with an inverse model that recovers the command between two views."""

__version__ = "0.1.0"
