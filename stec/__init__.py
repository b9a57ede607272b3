"""S-TEC: SimCLR with an inverse model that recovers the command between two views."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stec.pretrained import load_encoder as load_encoder

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``load_encoder`` is there once it is asked for, as it needs PyTorch."""
    if name == "load_encoder":
        from stec.pretrained import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
