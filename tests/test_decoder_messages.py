"""Messages of image decoders are dropped from standard error, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

PROGRAM = r"""
import os, subprocess, sys
from pipelines.decoder_messages import decoder_messages_dropped
with decoder_messages_dropped():
    os.write(2, b"libpng error: bad\nfrom a library\nCorrupt JPEG data: 5 extraneous\n")
    os.write(2, b"\x1b[0;31m[ERROR] \x1b[0m[libjpeg_turbo_decoder] Could not decode\nin two pa")
    print("from Python", file=sys.stderr)
    os.write(2, b"rts\n")
    subprocess.run(["sh", "-c", "echo from a child 1>&2"])
    sys.stdout.write("out\n")
    os.write(2, b"without an end")
    if sys.argv[1:] == ["raise"]:
        raise KeyError("the cause")
print("afterwards", file=sys.stderr)
"""


def run(*arguments: str) -> tuple[int, str, str]:
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, cwd=os.curdir, timeout=60
    )
    return process.returncode, process.stdout, process.stderr


def test_only_the_lines_of_decoders_are_dropped() -> None:
    code, out, err = run()
    assert (code, out) == (0, "out\n")
    assert sorted(err.splitlines()) == sorted(
        ["from a library", "from Python", "in two parts", "from a child", "without an end", "afterwards"]
    )
    assert err.splitlines()[-1] == "afterwards", "everything printed before has been forwarded"


def test_a_traceback_is_complete() -> None:
    code, _, err = run("raise")
    assert code == 1 and err.rstrip().endswith("KeyError: 'the cause'") and "from a library" in err
