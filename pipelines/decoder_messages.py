"""What image decoders print by themselves, and what of it reaches the user."""

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
"""Lines of libjpeg-turbo, libpng, libtiff and nvImageCodec on images. Which image they mean they do not say."""


@contextmanager
def decoder_messages_dropped() -> Iterator[None]:
    """While open, lines that decoders print on standard error do not get there; everything else does.

    Python's own lines, tracebacks among them, go straight to where standard error was. What libraries print goes
    through a thread that drops a decoder's lines: an image that cannot be used is reported by its name instead.
    """
    if not isinstance(sys.stderr, io.TextIOWrapper) or not _is_standard_error(sys.stderr):
        # Somebody else has taken care of it, such as a notebook or a test.
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
        with suppress(OSError):  # nobody reads it any more
            sys.stderr.close()
        sys.stderr = before
        os.dup2(real, 2)
        os.write(writable, _END + b"\n")
        # The thread goes on for processes that were started meanwhile: their standard error is the pipe.
        arrived.wait(timeout=5)
        os.close(writable)


_END = b"\0 everything before this has arrived \0"


def _is_standard_error(stream: io.TextIOWrapper) -> bool:
    with suppress(OSError, ValueError):
        return stream.fileno() == 2
    return False


def _forward(readable: int, real: int, arrived: threading.Event) -> None:
    """Bring what comes through the pipe to ``real``, line by line, without a decoder's lines."""
    rest = b""
    while chunk := os.read(readable, 2**16):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            # A last line may be without an end.
            line, end, _ = line.partition(_END)
            if (line or not end) and not DECODER_MESSAGE.search(line):
                with suppress(OSError):
                    os.write(real, line + b"\n")
            if end:
                arrived.set()
