"""Standard output and error that never fail: what nobody can read any more must not stop a run."""

from __future__ import annotations

import contextlib
import io
import sys


class _Stream(io.TextIOWrapper):
    """Text that cannot be written is dropped: the pipe's reader or the terminal is gone, or the log's disk is full."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def make_robust() -> None:
    """Replace the process's own standard output and error; streams that were put in their place are left alone.

    Characters that the terminal's encoding does not have, and bytes of names that are no text, become escapes.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue
        stream.flush()
        # Not the stream's own buffer, which may have been opened on another file than the descriptor now is of.
        buffer = open(stream.fileno(), "wb", buffering=0 if stream.write_through else -1, closefd=False)  # noqa: SIM115
        replacement = _Stream(
            buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, replacement)
