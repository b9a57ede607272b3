"""Suppresses the messages that image decoders print to standard error."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

DECODER_MESSAGE = re.compile(
    rb"\[(ERROR|WARNING)\].*\[\w+_(decoder|parser)\]"  # nvImageCodec, which DALI decodes with
    rb"|^Corrupt JPEG data|^Premature end of JPEG|^Invalid JPEG|^Unsupported marker type|^Input file read error"
    rb"|^Invalid progressive|^Inconsistent progression|^Warning: unknown JFIF|^JPEG datastream"
    rb"|^libpng (error|warning)|^TIFF\w+: "
)
"""Lines of libjpeg-turbo, libpng, libtiff and nvImageCodec about images, which they do not name."""


@contextmanager
def decoder_messages_dropped() -> Iterator[None]:
    """While open, lines that decoders print to standard error are dropped, and everything else is passed on.

    Output of Python, such as tracebacks, goes directly to the original standard error. Output of libraries goes through
    a thread that drops lines of decoders; bad images are reported by name instead.
    """
    if not isinstance(sys.stderr, io.TextIOWrapper) or not _is_standard_error(sys.stderr):
        # Standard error has been replaced, for example by a notebook or a test.
        yield
        return
    sys.stderr.flush()
    before, real = sys.stderr, os.dup(2)
    readable, writable = os.pipe()
    sys.stderr = type(before)(
        os.fdopen(os.dup(real), "wb"), encoding=before.encoding, errors=before.errors, line_buffering=True
    )
    os.dup2(writable, 2)
    arrived = threading.Event()
    threading.Thread(target=_forward, args=(readable, real, arrived), daemon=True).start()
    try:
        yield
    finally:
        with suppress(OSError):  # its reader has exited
            sys.stderr.close()
        sys.stderr = before
        os.dup2(real, 2)
        os.write(writable, _END + b"\n")
        # The thread continues for processes started in the meantime, whose standard error is the pipe.
        arrived.wait(timeout=5)
        os.close(writable)


_END = b"\0 everything before this has arrived \0"


def _is_standard_error(stream: io.TextIOWrapper) -> bool:
    with suppress(OSError, ValueError):
        return stream.fileno() == 2
    return False


def _forward(readable: int, real: int, arrived: threading.Event) -> None:
    """Copy lines from the pipe to ``real``, except those of decoders."""
    rest = b""
    while chunk := os.read(readable, 2**16):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            # The last line may lack a newline.
            line, end, _ = line.partition(_END)
            if (line or not end) and not DECODER_MESSAGE.search(line):
                with suppress(OSError):
                    os.write(real, line + b"\n")
            if end:
                arrived.set()
