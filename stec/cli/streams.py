"""Standard output and standard error that never raise: a closed terminal or a full disk must not stop a run."""

from __future__ import annotations

import contextlib
import io
import sys


class _Stream(io.TextIOWrapper):
    """Drops text that cannot be written, because the pipe or terminal is closed or the disk of the log is full."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


def make_robust() -> None:
    """Replace the standard output and error of this process, unless something else has replaced them already.

    Characters that the encoding of the terminal lacks, and undecodable bytes of file names, are escaped.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue
        stream.flush()
        # The stream's existing buffer may belong to another file than the descriptor does now.
        buffer = open(stream.fileno(), "wb", buffering=0 if stream.write_through else -1, closefd=False)  # noqa: SIM115
        replacement = _Stream(
            buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, replacement)
