"""Command line of the S-TEC trainer: ``accelerate launch launch.py [train | eval | index | export | ...] [flags]``."""

from __future__ import annotations

import importlib
import os
import sys

from pipelines.decoder_messages import decoder_messages_dropped
from pipelines.errors import Interrupted, UserError
from stec import __version__
from stec.cli.launcher import check_environment, end_with_launcher, is_main_process
from stec.cli.streams import make_robust

COMMANDS = {
    "train": "train",
    "eval": "evaluate",
    "embed": "embed",
    "index": "index",
    "import": "import_checkpoint",
    "export": "export",
    "recipes": "recipes",
    "preview": "preview",
    "report": "report",
}
"""Names of commands, and of the modules of ``stec.cli`` whose ``run`` they call."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command that the first argument names (default: train); returns the exit code."""
    make_robust()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--version" in arguments:
        print(f"stec {__version__}")
        return 0
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "train"
    try:
        check_environment(os.environ)
        end_with_launcher()
        if name not in COMMANDS:
            raise UserError(f"{name} is no command; known are {', '.join(COMMANDS)}, and without one launch.py trains.")
        with decoder_messages_dropped():
            importlib.import_module(f"stec.cli.{COMMANDS[name]}").run(arguments)
    except UserError as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr)
        elif error.local:
            print(f"error on process {os.environ['RANK']}: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if is_main_process():
            print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        if is_main_process():
            print("Stopped at once.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
